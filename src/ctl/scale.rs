//! Figures for people: short, with the unit's multiples.

/// `1.5 MiB/s`, `0.25`, `12 ms`: about three digits.
pub fn human(value: f64, unit: &str) -> String {
    let (base, per) = unit.strip_suffix("/s").map_or((unit, ""), |base| (base, "/s"));
    match base {
        "bytes" => {
            let (short, prefix) = scaled(value, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
            format!("{} {prefix}{per}", digits(short))
        }
        // Seconds a second are CPUs.
        "s" if per == "/s" => format!("{} CPU", digits(value)),
        "" => {
            let (short, prefix) = scaled(value, 1000.0, &["", "k", "M", "G", "T"]);
            format!("{}{prefix}{per}", digits(short))
        }
        other => format!("{} {other}{per}", digits(value)),
    }
}

fn scaled<'p>(value: f64, step: f64, prefixes: &[&'p str]) -> (f64, &'p str) {
    let (mut short, mut place) = (value, 0);
    while short.abs() >= step && place + 1 < prefixes.len() {
        (short, place) = (short / step, place + 1);
    }
    (short, prefixes[place])
}

fn digits(value: f64) -> String {
    let size = value.abs();
    let places = match size {
        0.0 => 0,
        size if size < 10.0 => 2,
        size if size < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.places$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_have_their_units_multiple() {
        for (value, unit, expected) in [
            (0.0, "bytes", "0 B"),
            (1536.0, "bytes/s", "1.5 KiB/s"),
            (536_870_912.0, "bytes", "512 MiB"),
            (0.25, "s/s", "0.25 CPU"),
            (12_345.0, "/s", "12.3k/s"),
            (2.0, "", "2"),
            (41.56, "°C", "41.6 °C"),
            (3.0, "s", "3 s"),
        ] {
            assert_eq!(human(value, unit), expected);
        }
    }
}
