//! Plots as SVG: lines through points, on linear or logarithmic axes.
//!
//! # Rules
//! - Both axes say what they show and in which unit; each series is named in the legend and has a
//!   mark of its own, so that a print without colours can be read.
//! - A whisker goes from a point up to its 99th percentile, where that is given.
//! - What cannot be shown (nothing above zero on a logarithmic axis) is left out.

use super::figures::Unit;
use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 92.0;
const RIGHT: f64 = 36.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 62.0;
/// Height of a line of the legend.
const LINE: f64 = 18.0;
/// Colours that people who see few colours can tell apart (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#7f7f7f",
];

/// An axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it shows.
    pub label: String,
    /// Its unit.
    pub unit: Unit,
    /// Whether equal distances are equal ratios.
    pub log: bool,
}

/// One line: points, each with its 99th percentile where that is known.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// The points, in order.
    pub points: Vec<(f64, f64, Option<f64>)>,
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Plot {
    /// What it shows.
    pub title: String,
    /// To the right.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// The lines.
    pub series: Vec<Series>,
}

/// How values of an axis become places.
struct Scale {
    low: f64,
    high: f64,
    log: bool,
    ticks: Vec<f64>,
}

impl Scale {
    fn of(values: impl Iterator<Item = f64> + Clone, axis: &Axis) -> Self {
        let log = axis.log;
        let shown = values.filter(|v| v.is_finite() && (!log || *v > 0.0));
        let least = shown.clone().reduce(f64::min).unwrap_or(1.0);
        let most = shown.reduce(f64::max).unwrap_or(10.0);
        if log {
            Self::logarithmic(least, most, axis.unit)
        } else {
            Self::linear(most)
        }
    }

    /// From zero to a round number.
    fn linear(most: f64) -> Self {
        let most = if most > 0.0 { most } else { 1.0 };
        let step = round_step(most / 5.0);
        let count = (most / step - 1e-9).ceil().max(1.0);
        let mut ticks = Vec::new();
        let mut at = 0.0;
        while at <= count + 0.5 {
            ticks.push(at * step);
            at += 1.0;
        }
        Self {
            low: 0.0,
            high: count * step,
            log: false,
            ticks,
        }
    }

    /// Between numbers that begin with 1, 2 or 5; of memory, between powers of two.
    fn logarithmic(least: f64, most: f64, unit: Unit) -> Self {
        let memory = unit == Unit::Memory;
        let (base, steps): (f64, &[f64]) = match most / least {
            _ if memory => (4.0, &[1.0]),
            ratio if ratio > 3000.0 => (10.0, &[1.0]),
            _ => (10.0, &[1.0, 2.0, 5.0]),
        };
        let mut all = Vec::new();
        let mut decade = base.powf(least.log(base).floor());
        while decade <= most * base {
            all.extend(steps.iter().map(|step| decade * step));
            decade *= base;
        }
        let near = 1.0 + 1e-9;
        let low = all
            .iter()
            .copied()
            .rfind(|t| *t <= least * near)
            .unwrap_or(least);
        let high = all
            .iter()
            .copied()
            .find(|t| *t * near >= most && *t > low)
            .unwrap_or(most);
        let ticks = all
            .into_iter()
            .filter(|t| *t >= low && *t <= high)
            .collect();
        Self {
            low,
            high,
            log: true,
            ticks,
        }
    }

    /// Where a value lies, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        if self.log {
            return (value.max(self.low) / self.low).ln() / (self.high / self.low).ln();
        }
        (value - self.low) / (self.high - self.low)
    }
}

/// 1, 2 or 5 times a power of ten, not below `step`.
fn round_step(step: f64) -> f64 {
    let decade = 10f64.powf(step.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    let found = factors.iter().find(|f| decade * **f >= step * (1.0 - 1e-9));
    decade * found.copied().unwrap_or(10.0)
}

impl Plot {
    /// The plot as a file.
    pub fn svg(&self) -> String {
        let points = || self.series.iter().flat_map(|s| s.points.iter());
        let xs = Scale::of(points().map(|p| p.0), &self.x);
        let ys = Scale::of(points().flat_map(|p| [p.1, p.2.unwrap_or(p.1)]), &self.y);
        #[expect(clippy::cast_precision_loss, reason = "a few series")]
        let legend = self.series.len() as f64 * LINE;
        let height = HEIGHT + legend;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
             width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
        );
        let title = escaped(&self.title);
        let _ = writeln!(
            svg,
            "<text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{title}</text>"
        );
        self.axes(&mut svg, &xs, &ys);
        for (nth, series) in self.series.iter().enumerate() {
            self.line(&mut svg, nth, series, &xs, &ys);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn axes(&self, svg: &mut String, xs: &Scale, ys: &Scale) {
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for tick in &xs.ticks {
            let x = across(xs, *tick);
            let text = escaped(&label(self.x.unit, *tick));
            let _ = writeln!(
                svg,
                "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#e4e4e4\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                bottom + 18.0
            );
        }
        for tick in &ys.ticks {
            let y = down(ys, *tick);
            let text = escaped(&label(self.y.unit, *tick));
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#e4e4e4\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
                LEFT - 6.0,
                y + 4.0
            );
        }
        let scale = |axis: &Axis| if axis.log { " (logarithmic)" } else { "" };
        let (x, y) = (f64::midpoint(LEFT, right), f64::midpoint(TOP, bottom));
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"#444\"/>\n\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}{}</text>\n\
             <text transform=\"translate(18 {y:.1}) rotate(-90)\" text-anchor=\"middle\">{}{}</text>",
            bottom + 42.0,
            escaped(&self.x.label),
            scale(&self.x),
            escaped(&self.y.label),
            scale(&self.y),
        );
    }

    fn line(&self, svg: &mut String, nth: usize, series: &Series, xs: &Scale, ys: &Scale) {
        let colour = COLOURS[nth % COLOURS.len()];
        let shown = series
            .points
            .iter()
            .filter(|(x, y, _)| (!self.x.log || *x > 0.0) && (!self.y.log || *y > 0.0));
        let mut path = String::new();
        let mut marks = String::new();
        for (x, y, high) in shown {
            let (at, up) = (across(xs, *x), down(ys, *y));
            let _ = write!(
                path,
                "{}{at:.1} {up:.1}",
                if path.is_empty() { "M" } else { "L" }
            );
            marks.push_str(&mark(nth, at, up, colour));
            if let Some(high) = high {
                let _ = write!(
                    marks,
                    "<path d=\"M{at:.1} {up:.1}V{:.1}m-4 0h8\" stroke=\"{colour}\" fill=\"none\" \
                     opacity=\"0.6\"/>",
                    down(ys, *high)
                );
            }
        }
        let _ = writeln!(
            svg,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"/>{marks}"
        );
        #[expect(clippy::cast_precision_loss, reason = "a few series")]
        let y = HEIGHT + nth as f64 * LINE;
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {y:.1}h28\" stroke=\"{colour}\" stroke-width=\"1.6\"/>{}\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            mark(nth, LEFT + 14.0, y, colour),
            LEFT + 38.0,
            y + 4.0,
            escaped(&series.name),
        );
    }
}

fn across(scale: &Scale, value: f64) -> f64 {
    LEFT + scale.place(value) * (WIDTH - LEFT - RIGHT)
}

fn down(scale: &Scale, value: f64) -> f64 {
    HEIGHT - BOTTOM - scale.place(value) * (HEIGHT - TOP - BOTTOM)
}

/// The mark of a series: circle, square, triangle, diamond in turn.
fn mark(nth: usize, x: f64, y: f64, colour: &str) -> String {
    let path = match nth % 4 {
        0 => return format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.6\" fill=\"{colour}\"/>"),
        1 => format!("M{:.1} {:.1}h7v7h-7z", x - 3.5, y - 3.5),
        2 => format!("M{x:.1} {:.1}l4.4 7.4h-8.8z", y - 4.6),
        _ => format!("M{x:.1} {:.1}l4.6 4.6l-4.6 4.6l-4.6-4.6z", y - 4.6),
    };
    format!("<path d=\"{path}\" fill=\"{colour}\"/>")
}

/// A value at a tick: without digits that say nothing.
fn label(unit: Unit, value: f64) -> String {
    let text = unit.show(value);
    let (number, rest) = match text.split_once(' ') {
        Some((number, rest)) if number.contains('.') => (number, format!(" {rest}")),
        _ if text.contains('.') => (text.as_str(), String::new()),
        _ => return text,
    };
    let number = number.trim_end_matches('0').trim_end_matches('.');
    format!("{number}{rest}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(label: &str, log: bool) -> Axis {
        Axis {
            label: label.into(),
            unit: Unit::Time,
            log,
        }
    }

    #[test]
    fn scales_are_round_and_hold_all() {
        let scale = Scale::of([3.0, 87.0].into_iter(), &axis("", false));
        assert_eq!((scale.low, scale.high), (0.0, 100.0));
        assert_eq!(scale.ticks, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        let scale = Scale::of([0.0, 300.0, 12_000.0].into_iter(), &axis("", true));
        assert_eq!((scale.low, scale.high), (200.0, 20_000.0));
        assert_eq!(scale.ticks, [200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4]);
        for (values, log) in [
            (vec![], true),
            (vec![], false),
            (vec![5.0], true),
            (vec![0.0], false),
        ] {
            let scale = Scale::of(values.iter().copied(), &axis("", log));
            assert!(scale.high > scale.low, "{values:?} {log}");
            for value in values {
                assert!((0.0..=1.0).contains(&scale.place(value)));
            }
        }
    }

    #[test]
    fn ticks_have_no_idle_digits() {
        assert_eq!(label(Unit::Time, 2000.0), "2 ms");
        assert_eq!(label(Unit::Time, 100.0), "100 µs");
        assert_eq!(label(Unit::Bytes, 1.5e9), "1.5 GB");
        assert_eq!(label(Unit::Ratio, 1.05), "1.05");
        assert_eq!(label(Unit::Count, 0.0), "0");
    }

    #[test]
    fn a_plot_names_its_series_and_shows_every_point() {
        let plot = Plot {
            title: "a < b".into(),
            x: axis("size", true),
            y: axis("time", false),
            series: vec![
                Series {
                    name: "one".into(),
                    points: vec![(1.0, 2.0, Some(3.0)), (10.0, 5.0, None)],
                },
                Series {
                    name: "two".into(),
                    points: vec![(0.0, 2.0, None), (10.0, 4.0, None)],
                },
            ],
        };
        let svg = plot.svg();
        assert!(svg.contains("a &lt; b") && svg.contains(">one<") && svg.contains(">two<"));
        assert!(svg.contains("size (logarithmic)") && svg.contains(">time<"));
        assert_eq!(
            svg.matches("<circle").count(),
            3,
            "two points and the legend"
        );
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
