//! A picture of a pool: who has what, and how scattered the rest is. Pure; as text and as SVG.

use crate::ledger::Ledger;
use crate::run::{PAGE, Run};
use std::fmt::Write as _;

/// What a part of a pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// The pool's own tables.
    Tables,
    /// Nobody's, and zeros.
    Free,
    /// Nobody's, and not zeroed yet.
    Dirty,
    /// An owner's.
    Of(&'a str),
}

/// All of a pool's medium, in order: runs of pages and what they are.
#[must_use]
pub fn parts(ledger: &Ledger) -> Vec<(Run, Part<'_>)> {
    let space = ledger.space();
    let mut all = vec![(Run::new(0, space.start), Part::Tables)];
    for extent in ledger.extents() {
        let pieces = extent.pieces.iter();
        all.extend(pieces.map(|piece| (piece.run, Part::Of(&extent.owner))));
    }
    for run in ledger.free().runs() {
        let mut at = run.start;
        for dirty in ledger.dirty().within(run) {
            all.push((Run::new(at, dirty.start - at), Part::Free));
            all.push((dirty, Part::Dirty));
            at = dirty.end();
        }
        all.push((Run::new(at, run.end() - at), Part::Free));
    }
    all.retain(|(run, _)| run.len > 0);
    all.sort_by_key(|(run, _)| run.start);
    all
}

/// How scattered the free pages are: 0 where all are one run, near 1 where all are apart.
#[must_use]
pub fn fragmentation(ledger: &Ledger) -> f64 {
    let (free, longest) = (ledger.free().pages(), ledger.free().longest(u64::MAX));
    if free == 0 {
        return 0.0;
    }
    #[expect(clippy::cast_precision_loss, reason = "a ratio to be shown")]
    let part = longest as f64 / free as f64;
    1.0 - part
}

/// The letters of owners, by name: `a` to `z`, then `A` to `Z`, then again.
fn letter(owners: &[&str], name: &str) -> char {
    let place = owners.iter().position(|owner| *owner == name).unwrap_or(0);
    let letters = ('a'..='z').chain('A'..='Z').cycle();
    letters.into_iter().nth(place % 52).unwrap_or('a')
}

/// Cells of `width` in as many lines as suit: each shows what has most of its pages. `#` tables, `.` free,
/// `~` free and not zeroed, letters owners, with a legend below.
#[must_use]
pub fn text(ledger: &Ledger, width: usize, lines: usize) -> String {
    let parts = parts(ledger);
    let owners: Vec<&str> = ledger.owners().map(|(name, _)| name).collect();
    let total = parts.last().map_or(1, |(run, _)| run.end());
    let cells = (width.max(1) * lines.max(1)) as u64;
    let cell = total.div_ceil(cells).max(1);
    let mut text = String::new();
    let mut next = 0;
    for at in 0..total.div_ceil(cell) {
        let here = Run::new(at * cell, cell);
        while parts
            .get(next)
            .is_some_and(|(run, _)| run.end() <= here.start)
        {
            next += 1;
        }
        let mut most: Vec<(char, u64)> = Vec::new();
        let inside = parts[next..].iter();
        for (run, part) in inside.take_while(|(run, _)| run.start < here.end()) {
            let sign = match part {
                Part::Tables => '#',
                Part::Free => '.',
                Part::Dirty => '~',
                Part::Of(name) => letter(&owners, name),
            };
            let len = run.common(here).map_or(0, |run| run.len);
            match most.iter_mut().find(|(known, _)| *known == sign) {
                Some((_, sum)) => *sum += len,
                None => most.push((sign, len)),
            }
        }
        let sign = most.iter().max_by_key(|(_, len)| *len);
        text.push(sign.map_or(' ', |(sign, _)| *sign));
        if (at + 1) % width.max(1) as u64 == 0 {
            text.push('\n');
        }
    }
    if !text.ends_with('\n') {
        text.push('\n');
    }
    let _ = writeln!(
        text,
        "one sign is {} KiB; # tables  . free  ~ free, not zeroed",
        cell * PAGE / 1024
    );
    for name in &owners {
        let _ = writeln!(text, "{} {name}", letter(&owners, name));
    }
    text
}

/// The same as a drawing, 1000 units wide, each run at its place.
#[must_use]
pub fn svg(ledger: &Ledger, title: &str) -> String {
    const ROWS: u64 = 16;
    const WIDE: u64 = 1000;
    const HIGH: u64 = 24;
    let parts = parts(ledger);
    let owners: Vec<&str> = ledger.owners().map(|(name, _)| name).collect();
    let total = parts.last().map_or(1, |(run, _)| run.end());
    let row = total.div_ceil(ROWS).max(1);
    let height = ROWS * HIGH + 24 * (owners.len() as u64 + 3);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDE} {height}\" \
         font-family=\"sans-serif\" font-size=\"14\">\n<title>{}</title>",
        escaped(title)
    );
    for (run, part) in &parts {
        for line in run.start / row..=(run.end() - 1) / row {
            let Some(here) = run.common(Run::new(line * row, row)) else {
                continue;
            };
            #[expect(clippy::cast_precision_loss, reason = "places in a drawing")]
            let at = |pages: u64| pages as f64 * WIDE as f64 / row as f64;
            let _ = writeln!(
                out,
                "<rect x=\"{:.2}\" y=\"{}\" width=\"{:.2}\" height=\"{}\" fill=\"{}\"><title>{}: bytes {} to {}</title></rect>",
                at(here.start - line * row),
                line * HIGH,
                at(here.len),
                HIGH - 2,
                colour(&owners, *part),
                escaped(label(*part)),
                run.start * PAGE,
                run.end() * PAGE,
            );
        }
    }
    let legend = [Part::Tables, Part::Free, Part::Dirty].into_iter();
    for (n, part) in (1..).zip(legend.chain(owners.iter().map(|name| Part::Of(name)))) {
        let y = ROWS * HIGH + 24 * n;
        let _ = writeln!(
            out,
            "<rect x=\"0\" y=\"{}\" width=\"18\" height=\"18\" fill=\"{}\"/><text x=\"26\" y=\"{y}\">{}</text>",
            y - 14,
            colour(&owners, part),
            escaped(label(part)),
        );
    }
    out.push_str("</svg>\n");
    out
}

fn label(part: Part<'_>) -> &str {
    match part {
        Part::Tables => "tables of the pool",
        Part::Free => "free",
        Part::Dirty => "free, not zeroed",
        Part::Of(name) => name,
    }
}

fn colour(owners: &[&str], part: Part<'_>) -> String {
    match part {
        Part::Tables => "#555".to_owned(),
        Part::Free => "#eee".to_owned(),
        Part::Dirty => "#ccb".to_owned(),
        Part::Of(name) => {
            let place = owners.iter().position(|owner| *owner == name).unwrap_or(0);
            // Steps of the golden angle keep neighbours apart.
            format!("hsl({} 60% 55%)", place * 137 % 360)
        }
    }
}

fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Request;

    fn ledger() -> Ledger {
        let mut ledger = Ledger::new(Run::new(10, 90));
        ledger.dirty.remove(Run::new(10, 80));
        for (owner, pages) in [("vm1", 20), ("vm2", 10), ("vm1", 10)] {
            let request = Request {
                owner: owner.to_owned(),
                pages,
                thin: false,
                below: Some(90),
                quota: None,
                file: None,
            };
            let (_, plan) = ledger.allocate(&request).unwrap();
            assert!(ledger.apply(plan.changes));
        }
        ledger
    }

    #[test]
    fn the_parts_are_all_of_the_medium_once() {
        let ledger = ledger();
        let mut at = 0;
        for (run, _) in parts(&ledger) {
            assert_eq!(run.start, at);
            at = run.end();
        }
        assert_eq!(at, 100);
        let of = |wanted| {
            let runs = parts(&ledger).into_iter();
            runs.filter(|(_, part)| *part == wanted)
                .map(|(run, _)| run.len)
                .sum::<u64>()
        };
        assert_eq!((of(Part::Tables), of(Part::Dirty)), (10, 10));
        assert_eq!((of(Part::Of("vm1")), of(Part::Of("vm2"))), (30, 10));
    }

    #[test]
    fn the_text_has_a_sign_for_each_part() {
        let ledger = ledger();
        let text = text(&ledger, 10, 10);
        let signs: String = text.lines().take(10).collect();
        let count = |sign| signs.chars().filter(|c| *c == sign).count();
        assert_eq!(signs.len(), 100, "{text}");
        assert_eq!(
            (count('#'), count('a'), count('b'), count('~')),
            (10, 30, 10, 10),
            "{text}"
        );
        assert!(
            text.ends_with(
                "one sign is 4 KiB; # tables  . free  ~ free, not zeroed\na vm1\nb vm2\n"
            )
        );
        let svg = svg(&ledger, "a <pool>");
        assert!(svg.contains("<title>a &lt;pool&gt;</title>") && svg.ends_with("</svg>\n"));
        assert!(svg.matches("<rect").count() >= parts(&ledger).len() + 5);
    }

    #[test]
    fn fragmentation_is_none_in_one_run() {
        assert!(fragmentation(&Ledger::new(Run::new(3, 77))) == 0.0);
        assert!(fragmentation(&ledger()) > 0.0);
    }
}
