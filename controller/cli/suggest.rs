//! What somebody may have meant who wrote a name that is none.

/// How many names are suggested.
const MOST: usize = 3;

/// The words that are most like `text`, as the end of a sentence; nothing if none is.
pub fn suggest<'a>(text: &str, words: impl Iterator<Item = &'a str>) -> String {
    let allowed = (text.chars().count() / 3).max(1);
    let mut like: Vec<(usize, &str)> = words
        .filter_map(|word| {
            let distance = distance(text, word);
            let begins = text.len() > 2 && word.starts_with(text);
            (distance <= allowed || begins).then_some((distance, word))
        })
        .collect();
    like.sort_unstable();
    // What is right but for a letter needs no company.
    let best = like.first().map_or(0, |(distance, _)| *distance);
    like.retain(|(distance, _)| *distance <= best + 1);
    like.truncate(MOST);
    match like.iter().map(|(_, word)| *word).collect::<Vec<_>>().as_slice() {
        [] => String::new(),
        [word] => format!(": did you mean {word}?"),
        [words @ .., last] => format!(": did you mean {} or {last}?", words.join(", ")),
    }
}

/// How many letters have to be changed, left out, added, or exchanged with their neighbour.
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let mut before = Vec::new();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, letter) in one.iter().enumerate() {
        let mut next = vec![i + 1];
        for (j, theirs) in other.iter().enumerate() {
            let mut least =
                (row[j] + usize::from(letter != theirs)).min(row[j + 1] + 1).min(next[j] + 1);
            if i > 0 && j > 0 && *letter == other[j - 1] && one[i - 1] == *theirs {
                least = least.min(before[j - 1] + 1);
            }
            next.push(least);
        }
        before = std::mem::replace(&mut row, next);
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_count_what_fingers_do() {
        for (one, other, expected) in [
            ("", "", 0),
            ("open", "open", 0),
            ("opne", "open", 1),
            ("opena", "openat", 1),
            ("raed", "read", 1),
            ("getpid", "getppid", 1),
            ("a", "", 1),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(one, other), expected, "{one} {other}");
            assert_eq!(distance(other, one), expected, "{other} {one}");
        }
    }

    #[test]
    fn what_is_like_nothing_gets_no_suggestion() {
        let words = ["openat", "read", "write"];
        assert_eq!(suggest("opneat", words.into_iter()), ": did you mean openat?");
        assert_eq!(suggest("xyzzy", words.into_iter()), "");
        assert_eq!(suggest("", words.into_iter()), "");
    }
}
