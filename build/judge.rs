//! What may be in the image: the linker script only places, here it is decided.
//!
//! The image is mapped read-only and executable at any address and entered as it is. So nothing in
//! it may be written, and nothing may have to be filled in first.

use object::elf;
use object::read::elf::{ElfFile64, ElfSection64, FileHeader, ProgramHeader};
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol, SectionFlags};

/// Where the entry table lies, its first bytes, and the largest image: abi's ENTRY_TABLE_OFFSET,
/// IMAGE_MAGIC and IMAGE_MAX_SIZE (a test compares them).
pub const ENTRY_TABLE_OFFSET: usize = 176;
pub const IMAGE_MAGIC: &[u8; 8] = b"farcall\0";
pub const IMAGE_MAX_SIZE: usize = 12_288;

/// The image, or a list of what is wrong with it, each item with the name of the offender.
///
/// The image is the loaded segment alone: section headers and symbols are cut off, and the ELF
/// header says so.
pub fn judge(file: &[u8]) -> Result<Vec<u8>, Vec<String>> {
    let elf: ElfFile64<'_, LittleEndian> =
        ElfFile64::parse(file).map_err(|error| vec![format!("not an ELF file: {error}")])?;
    let mut offenders = Vec::new();
    relocations(&elf, &mut offenders);
    sections(&elf, &mut offenders);
    for symbol in elf.symbols().filter(|symbol| symbol.is_undefined()) {
        match symbol.name() {
            Ok("") | Err(_) => {}
            Ok(name) => offenders.push(format!("undefined symbol: {name}")),
        }
    }
    let image = segment(&elf, file, &mut offenders);
    if offenders.is_empty() { Ok(image) } else { Err(offenders) }
}

/// What lies at an address: the symbol that covers it, else its section.
fn name_at(elf: &ElfFile64<'_, LittleEndian>, address: u64) -> String {
    elf.symbols()
        .filter(|symbol| symbol.is_definition() && symbol.size() > 0)
        .find(|symbol| (symbol.address()..symbol.address() + symbol.size()).contains(&address))
        .and_then(|symbol| symbol.name().ok().map(String::from))
        .or_else(|| {
            section_at(elf, address)?.name().ok().map(|name| format!("{name}+{address:#x}"))
        })
        .unwrap_or_else(|| format!("{address:#x}"))
}

fn section_at<'a>(
    elf: &'a ElfFile64<'a, LittleEndian>,
    address: u64,
) -> Option<ElfSection64<'a, 'a, LittleEndian>> {
    elf.sections()
        .find(|section| (section.address()..section.address() + section.size()).contains(&address))
}

/// The text of the `&str` whose pointer would be filled in at `slot` with `address`. If that is
/// the first part of a panic's location, its line follows.
fn text_at(elf: &ElfFile64<'_, LittleEndian>, slot: u64, address: u64) -> Option<String> {
    let bytes = |from: u64, len: u64| section_at(elf, from)?.data_range(from, len).ok().flatten();
    let len = u64::from_le_bytes(bytes(slot.checked_add(8)?, 8)?.try_into().ok()?);
    let text = std::str::from_utf8(bytes(address, len)?).ok().filter(|text| !text.is_empty())?;
    let line = bytes(slot.checked_add(16)?, 4).filter(|_| text.ends_with(".rs"));
    Some(match line.and_then(|line| line.try_into().ok()).map(u32::from_le_bytes) {
        Some(line) => format!("a panic at {text}:{line}"),
        None => format!("{text:?}"),
    })
}

fn relocations(elf: &ElfFile64<'_, LittleEndian>, offenders: &mut Vec<String>) {
    let endian = LittleEndian;
    for section in elf.elf_section_table().iter() {
        let kind = section.sh_type.get(endian);
        let size = section.sh_size.get(endian);
        if kind == elf::SHT_RELR && size > 0 {
            offenders.push(format!("relocations: {size} bytes of packed ones"));
        }
        if kind != elf::SHT_RELA || size == 0 {
            continue;
        }
        let Ok(bytes) = object::read::elf::SectionHeader::data_as_array::<
            elf::Rela64<LittleEndian>,
            _,
        >(section, endian, elf.data()) else {
            offenders.push("relocations: unreadable".into());
            continue;
        };
        for relocation in bytes {
            let slot = relocation.r_offset.get(endian);
            let address = relocation.r_addend.get(endian).cast_unsigned();
            let target = text_at(elf, slot, address).unwrap_or_else(|| name_at(elf, address));
            offenders.push(format!("relocation in {}, to {target}", name_at(elf, slot)));
        }
    }
}

fn sections(elf: &ElfFile64<'_, LittleEndian>, offenders: &mut Vec<String>) {
    for section in elf.sections().filter(|section| section.size() > 0) {
        let name = section.name().unwrap_or("?");
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else { continue };
        let has = |flag: elf::SectionFlags| sh_flags.0 & flag.0 != 0;
        let allocated = has(elf::SHF_ALLOC);
        let range = section.address()..section.address() + section.size();
        let symbols: Vec<_> = elf
            .symbols()
            .filter(|symbol| symbol.size() > 0 && range.contains(&symbol.address()))
            .filter_map(|symbol| symbol.name().ok())
            .collect();
        if name.starts_with(".got") || name.starts_with(".plt") {
            offenders.push(format!("{name}: {} bytes, a table to be filled in", section.size()));
        } else if allocated && has(elf::SHF_TLS) {
            offenders.push(format!("thread-local data in {name}: {}", symbols.join(", ")));
        } else if allocated && has(elf::SHF_WRITE) {
            offenders.push(format!("writable data in {name}: {}", symbols.join(", ")));
        }
    }
}

/// The one loaded segment.
fn segment(elf: &ElfFile64<'_, LittleEndian>, file: &[u8], offenders: &mut Vec<String>) -> Vec<u8> {
    let endian = LittleEndian;
    let mut loads =
        elf.elf_program_headers().iter().filter(|header| header.p_type(endian) == elf::PT_LOAD);
    let (Some(load), None) = (loads.next(), loads.next()) else {
        offenders.push("not exactly one loaded segment".into());
        return Vec::new();
    };
    let size = usize::try_from(load.p_filesz(endian)).unwrap_or(usize::MAX);
    if load.p_offset(endian) != 0
        || load.p_vaddr(endian) != 0
        || load.p_memsz(endian) != load.p_filesz(endian)
        || load.p_flags(endian) != elf::PF_R | elf::PF_X
    {
        offenders.push("the segment is not the file's first bytes, readable and executable".into());
    }
    if size > IMAGE_MAX_SIZE {
        offenders.push(format!(
            "{size} bytes, which is over {IMAGE_MAX_SIZE}; the largest parts are {}",
            largest(elf).join(", ")
        ));
    }
    let mut image = file.get(..size).unwrap_or_default().to_vec();
    if image.get(ENTRY_TABLE_OFFSET..ENTRY_TABLE_OFFSET + 8) != Some(IMAGE_MAGIC) {
        offenders.push(format!("no entry table at byte {ENTRY_TABLE_OFFSET}"));
        return image;
    }
    // e_shoff, then e_shnum and e_shstrndx: the section headers are gone.
    debug_assert!(elf.elf_header().e_shoff(endian) != 0);
    image[40..48].fill(0);
    image[60..64].fill(0);
    image
}

/// The largest symbols, with their sizes.
fn largest(elf: &ElfFile64<'_, LittleEndian>) -> Vec<String> {
    let mut symbols: Vec<_> = elf.symbols().filter(|symbol| symbol.is_definition()).collect();
    symbols.sort_by_key(|symbol| std::cmp::Reverse(symbol.size()));
    let described = symbols.iter().take(4).filter_map(|symbol| {
        symbol.name().ok().map(|name| format!("{name} ({} bytes)", symbol.size()))
    });
    described.collect()
}
