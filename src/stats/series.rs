//! Which figure of an object a series is of.

use super::metric::MetricId;
use std::sync::Arc;

/// A metric, and the instance where it has several: `cpu_time`, `vif_rx_bytes:0`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesKey {
    /// `None`: of a metric that is no more.
    metric: Option<MetricId>,
    instance: Option<Arc<str>>,
}

impl std::fmt::Display for SeriesKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.metric.map_or("?", |metric| metric.metric().name))?;
        match &self.instance {
            Some(instance) => write!(f, ":{instance}"),
            None => Ok(()),
        }
    }
}

impl SeriesKey {
    pub fn new(metric: MetricId, instance: Option<Arc<str>>) -> Self {
        Self { metric: Some(metric), instance }
    }

    /// What [`Display`](std::fmt::Display) writes, of a metric that is known.
    pub fn parse(text: &str) -> Option<Self> {
        Some(Self::read(text)).filter(|key| key.metric.is_some())
    }

    /// As a file has it.
    pub(super) fn read(text: &str) -> Self {
        let (name, instance) = match text.split_once(':') {
            Some((name, instance)) => (name, Some(instance.into())),
            None => (text, None),
        };
        Self { metric: MetricId::parse(name), instance }
    }

    pub fn metric(&self) -> Option<MetricId> {
        self.metric
    }

    pub fn instance(&self) -> Option<&str> {
        self.instance.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_read_as_it_is_written() {
        for text in ["cpu_time", "vif_rx_bytes:0", "temperature:Core 0: odd"] {
            assert_eq!(SeriesKey::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(SeriesKey::parse("no_such"), None);
        assert_eq!(SeriesKey::read("gone:1").to_string(), "?:1");
    }
}
