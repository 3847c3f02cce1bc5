//! Redis' glob patterns over bytes: `*`, `?`, `[a-z]`, `[^x]` and `\` before what is meant as it is.

/// Whether the whole of `text` matches. Takes time of the order of their lengths' product at most.
pub(super) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Behind the last star, and where in the text it is taken to end.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p + 1, t));
            p += 1;
            continue;
        }
        match text.get(t) {
            None if p == pattern.len() => return true,
            None => return false,
            Some(byte) => {
                if let Some(next) = one(pattern, p, *byte) {
                    (p, t) = (next, t + 1);
                    continue;
                }
            }
        }
        // The last star takes one byte more.
        let Some((behind, end)) = star else { return false };
        star = Some((behind, end + 1));
        (p, t) = (behind, end + 1);
    }
}

/// Where the pattern goes on if what stands at `p` matches this byte.
fn one(pattern: &[u8], p: usize, byte: u8) -> Option<usize> {
    match *pattern.get(p)? {
        b'?' => Some(p + 1),
        b'[' => {
            let (set, next) = class(pattern, p + 1);
            set(byte).then_some(next)
        }
        b'\\' if p + 1 < pattern.len() => (pattern[p + 1] == byte).then_some(p + 2),
        other => (other == byte).then_some(p + 1),
    }
}

/// The set that begins behind a `[`, and where it ends; one that is never closed ends with the pattern.
fn class(pattern: &[u8], start: usize) -> (impl Fn(u8) -> bool, usize) {
    let mut p = start;
    let negated = pattern.get(p) == Some(&b'^');
    p += usize::from(negated);
    let mut ranges = Vec::new();
    while let Some(&first) = pattern.get(p) {
        match first {
            b']' => break,
            b'\\' if p + 1 < pattern.len() => {
                ranges.push((pattern[p + 1], pattern[p + 1]));
                p += 2;
            }
            _ if pattern.get(p + 1) == Some(&b'-') && p + 2 < pattern.len() => {
                let last = pattern[p + 2];
                ranges.push((first.min(last), first.max(last)));
                p += 3;
            }
            _ => {
                ranges.push((first, first));
                p += 1;
            }
        }
    }
    let set = move |byte| ranges.iter().any(|(first, last)| (*first..=*last).contains(&byte)) != negated;
    (set, (p + 1).min(pattern.len()))
}

/// What every match begins with.
pub(super) fn prefix(pattern: &[u8]) -> &[u8] {
    let end = pattern.iter().position(|byte| b"*?[\\".contains(byte));
    &pattern[..end.unwrap_or(pattern.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_redis_has_them() {
        for (pattern, text, fits) in [
            ("", "", true),
            ("*", "", true),
            ("h?llo", "hello", true),
            ("h?llo", "hllo", false),
            ("h*llo", "heeeello", true),
            ("h[ae]llo", "hillo", false),
            ("h[^e]llo", "hallo", true),
            ("h[^e]llo", "hello", false),
            ("h[a-b]llo", "hbllo", true),
            ("h[b-a]llo", "hallo", true),
            ("\\*x", "*x", true),
            ("\\*x", "yx", false),
            ("a*b*c", "aXbXbXc", true),
            ("a*b*c", "aXbXbX", false),
            ("*a", "aaab", false),
            ("[\\]]", "]", true),
            ("a[b", "ab", true),
            ("user:*:name", "user:7:name", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), fits, "{pattern} {text}");
        }
        let stars = b"*a".repeat(60);
        assert!(!matches(&stars, &[b'b'; 5000]), "and soon");
        assert_eq!(prefix(b"user:*"), b"user:");
        assert_eq!(prefix(b"user"), b"user");
    }
}
