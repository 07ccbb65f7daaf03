//! A plot in the terminal: columns of block elements, an axis with units, the time below. Pure.

use super::scale::human;

const BLOCKS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Where nothing is known.
const UNKNOWN: char = '·';

/// Values from left to right over equal times.
pub struct Series<'a> {
    pub values: &'a [Option<f64>],
    pub unit: &'a str,
    /// Words below the left and the right end.
    pub from: &'a str,
    pub to: &'a str,
}

/// Lines of at most `width` columns: `height` of plot, the axis, the times.
pub fn plot(series: &Series<'_>, width: usize, height: usize) -> Vec<String> {
    let known: Vec<f64> = series.values.iter().flatten().copied().filter(|value| value.is_finite()).collect();
    if known.is_empty() {
        return vec!["nothing is known of that time".to_owned()];
    }
    let height = height.max(2);
    let most = known.iter().copied().fold(f64::MIN, f64::max);
    // From zero: a plot that begins elsewhere makes much of little. Below zero there are temperatures only.
    let least = known.iter().copied().fold(0.0, f64::min);
    let span = if most > least { most - least } else { 1.0 };
    let top = least + span;
    let label = |row: usize| {
        let part = row as f64 / (height - 1) as f64;
        human(least + span * part, series.unit)
    };
    let labels: Vec<String> = (0..height).map(label).collect();
    let margin = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
    let columns = squeezed(series.values, width.saturating_sub(margin + 2).max(1));
    let mut lines = Vec::with_capacity(height + 2);
    for row in (0..height).rev() {
        // Labels at the ends and in the middle are enough.
        let told = row == 0 || row == height - 1 || row == height / 2;
        let label = if told { labels[row].as_str() } else { "" };
        let mut line = format!("{label:>margin$} │");
        for value in &columns {
            line.push(match value {
                None if row == 0 => UNKNOWN,
                None => ' ',
                Some(value) => block((value - least) / (top - least) * height as f64 - row as f64),
            });
        }
        lines.push(line.trim_end().to_owned());
    }
    lines.push(format!("{:>margin$} └{}", "", "─".repeat(columns.len())));
    let gap = columns.len().saturating_sub(series.from.chars().count() + series.to.chars().count()).max(1);
    lines.push(format!("{:>margin$}  {}{}{}", "", series.from, " ".repeat(gap), series.to));
    lines
}

/// The part of a row that a column fills.
fn block(filled: f64) -> char {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 8")]
    let eighths = (filled.clamp(0.0, 1.0) * 8.0).round() as usize;
    BLOCKS[eighths.min(8)]
}

/// No more columns than fit: the means of neighbours.
fn squeezed(values: &[Option<f64>], columns: usize) -> Vec<Option<f64>> {
    if values.len() <= columns {
        return values.to_vec();
    }
    let cut = |column: usize| column * values.len() / columns;
    let mean = |part: &[Option<f64>]| {
        let known: Vec<f64> = part.iter().flatten().copied().collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    };
    (0..columns).map(|column| mean(&values[cut(column)..cut(column + 1)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_plot_rises_where_its_values_do_and_shows_what_is_not_known() {
        let values = [Some(0.0), Some(1.0), None, Some(2.0), Some(4.0)];
        let lines = plot(&Series { values: &values, unit: "s/s", from: "10:00", to: "now" }, 40, 4);
        assert_eq!(
            lines,
            [
                "   4 CPU │    █",
                "2.67 CPU │    █",
                "         │   ██",
                "   0 CPU │ █·██",
                "         └─────",
                "          10:00 now",
            ]
        );
        let none = Series { values: &[None, None], unit: "", from: "", to: "" };
        assert_eq!(plot(&none, 40, 4), ["nothing is known of that time"]);
    }

    proptest! {
        #[test]
        fn no_line_is_wider_than_it_may_be_and_no_value_breaks_it(
            values in proptest::collection::vec(proptest::option::of(-1e12..1e12_f64), 1..500),
            width in 30..200_usize, height in 0..40_usize,
        ) {
            let series = Series { values: &values, unit: "bytes/s", from: "a", to: "b" };
            for line in plot(&series, width, height) {
                prop_assert!(line.chars().count() <= width, "{} > {width}: {line}", line.chars().count());
            }
        }
    }
}
