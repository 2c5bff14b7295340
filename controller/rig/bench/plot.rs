//! The ratios as a picture: a bar a figure, to the left of the line where it is below its baseline.
//! A thin line on its end is the spread.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Row;
use crate::command::Failure;

/// Pixels of a bar with the space around it, and of what stands beside the bars.
const BAR: i32 = 34;
const NAMES: i32 = 230;
const NOTES: i32 = 420;
const WIDTH: i32 = 1100;
const TOP: i32 = 70;
const BOTTOM: i32 = 40;
/// The ratios at the left and right end, in powers of ten.
const LOWEST: f64 = -1.0;
const HIGHEST: f64 = 1.3;

const GRID: RGBColor = RGBColor(210, 210, 210);
const TEXT: RGBColor = RGBColor(40, 40, 40);
const COLOR: RGBColor = RGBColor(70, 120, 180);

/// The picture as SVG.
pub fn ratios(rows: &[Row]) -> Result<String, Failure> {
    let rows: Vec<(&Row, f64)> =
        rows.iter().filter_map(|row| row.ratio.map(|ratio| (row, ratio))).collect();
    let height = TOP + BOTTOM + BAR * rows.len() as i32;
    let mut svg = String::new();
    let size = (WIDTH as u32, height as u32);
    let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    draw(&root, &rows, height - BOTTOM).map_err(|error| Failure::new(error.to_string()))?;
    root.present()?;
    drop(root);
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Where a ratio lies.
fn x(ratio: f64) -> i32 {
    let part = (ratio.log10().clamp(LOWEST, HIGHEST) - LOWEST) / (HIGHEST - LOWEST);
    NAMES + (part * f64::from(WIDTH - NAMES - NOTES)) as i32
}

fn draw(root: &Area<'_>, rows: &[(&Row, f64)], bottom: i32) -> Drawn {
    let text = |size: i32, horizontal| {
        let place = Pos::new(horizontal, VPos::Center);
        ("sans-serif", size).into_font().color(&TEXT).pos(place)
    };
    root.fill(&WHITE)?;
    let title = "farcall bench: ratios to baselines of the same run (1 = as the baseline)";
    root.draw_text(title, &text(20, HPos::Left), (16, 24))?;
    for mark in [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0] {
        let at = x(mark);
        let line = if mark == 1.0 { TEXT.stroke_width(2) } else { GRID.stroke_width(1) };
        root.draw(&PathElement::new([(at, TOP - 8), (at, bottom)], line))?;
        root.draw_text(&mark.to_string(), &text(14, HPos::Center), (at, bottom + 16))?;
    }
    for (place, (row, ratio)) in (0..).zip(rows) {
        let middle = TOP + BAR * place + BAR / 2;
        let (from, to) = (x(1.0), x(*ratio));
        let bar = [(from.min(to), middle - BAR / 3), (from.max(to), middle + BAR / 3)];
        root.draw(&Rectangle::new(bar, COLOR.filled()))?;
        // Of the figure and its baseline together.
        let spreads = [row.spread, row.baseline_spread].map(Option::unwrap_or_default);
        let spread = spreads.iter().sum::<f64>() / 100.0;
        let ends = [(x(ratio / (1.0 + spread)), middle), (x(ratio * (1.0 + spread)), middle)];
        root.draw(&PathElement::new(ends, TEXT.stroke_width(2)))?;
        root.draw_text(row.name, &text(16, HPos::Right), (NAMES - 12, middle))?;
        let against = row.baseline.unwrap_or_default();
        let note = format!("{ratio:.2} × {against} ({:.2} {})", row.value, row.unit);
        root.draw_text(&note, &text(14, HPos::Left), (WIDTH - NOTES + 12, middle))?;
    }
    Ok(())
}
