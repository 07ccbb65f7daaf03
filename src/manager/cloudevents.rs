//! The form of a batch: a JSON batch of CloudEvents 1.0 (cloudevents.io, "JSON Event Format", section 4).
//!
//! ```text
//! id           events: <stream>-<number>; the same each time an event is sent
//!              statistics: <time in ms>-<object>
//!              gap: <stream>-gap-<first missing number>; its `to` may have grown when it is sent again
//! source       urn:uuid:<the host's unique id>
//! type         dom0d.<type of the event>, dom0d.statistics, dom0d.gap, dom0d.test
//! subject      the object: vm/<uuid>, host, job/<n>
//! time         when it happened
//! sequence     the number, as text (CloudEvents' extension "sequence")
//! severity     of events
//! traceparent  the W3C trace of the request that caused it, if there was one
//! data         events: number, text, severity, job, data; statistics: name, domid, interval_s, figures;
//!              gap: stream, from, to
//! ```
//!
//! All of it is in this file: a manager's own form would be another file with the same functions.

use super::source::{Gap, Stream};
use crate::event::Event;
use crate::model::{EventNumber, Timestamp};
use crate::stats::{Figure, ObjectFigures};
use serde::ser::SerializeSeq as _;
use serde::{Serialize, Serializer};

pub const CONTENT_TYPE: &str = "application/cloudevents-batch+json";

/// One CloudEvent.
#[derive(Serialize)]
struct Envelope<'a, D> {
    specversion: &'static str,
    id: String,
    source: &'a str,
    #[serde(rename = "type")]
    kind: String,
    subject: String,
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    sequence: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    severity: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<&'a str>,
    datacontenttype: &'static str,
    data: D,
}

#[derive(Serialize)]
struct EventData<'a> {
    number: u64,
    severity: &'static str,
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<u64>,
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    data: &'a serde_json::Map<String, serde_json::Value>,
}

#[derive(Serialize)]
struct GapData {
    stream: &'static str,
    from: u64,
    to: u64,
}

#[derive(Serialize)]
struct SampleData<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    domid: Option<u32>,
    interval_s: u32,
    figures: Figures<'a>,
}

/// `[{"metric": "cpu_time", "value": 1.5}, {"metric": "vif_rx_bytes", "instance": "vif3.0", "value": 12}]`
struct Figures<'a>(&'a [Figure]);

#[derive(Serialize)]
struct FigureData<'a> {
    metric: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance: Option<&'a str>,
    value: f64,
}

impl Serialize for Figures<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for figure in self.0 {
            list.serialize_element(&FigureData {
                metric: figure.metric.metric().name,
                instance: figure.instance.as_deref(),
                value: figure.value,
            })?;
        }
        list.end()
    }
}

/// A batch in the making.
pub struct Body<'a> {
    /// Our `source`.
    source: &'a str,
    /// The id of the event log, for ids that are never given twice.
    log: &'a str,
    bytes: Vec<u8>,
}

impl<'a> Body<'a> {
    pub fn new(source: &'a str, log: &'a str) -> Self {
        Self { source, log, bytes: vec![b'['] }
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.len() == 1
    }

    pub fn finish(mut self) -> bytes::Bytes {
        self.bytes.push(b']');
        self.bytes.into()
    }

    /// A body that was longer is cut back to what it was.
    pub fn cut_back(&mut self, len: usize) {
        self.bytes.truncate(len.max(1));
    }

    fn push<D: Serialize>(&mut self, envelope: &Envelope<'_, D>) {
        let before = self.bytes.len();
        if !self.is_empty() {
            self.bytes.push(b',');
        }
        // Writing to memory does not fail, and all of these can be written as JSON: keys are texts, numbers finite.
        if let Err(error) = serde_json::to_writer(&mut self.bytes, envelope) {
            tracing::error!(%error, "an item cannot be written as JSON and is left out");
            self.bytes.truncate(before);
        }
    }

    pub fn event(&mut self, number: EventNumber, event: &Event) {
        self.push(&Envelope {
            specversion: "1.0",
            id: format!("{}-{}", self.log, number.0),
            source: self.source,
            kind: format!("dom0d.{}", event.kind),
            subject: event.object.clone(),
            time: event.time.to_string(),
            sequence: Some(number.0.to_string()),
            severity: Some(event.severity.as_str()),
            traceparent: event.trace.as_deref(),
            datacontenttype: "application/json",
            data: EventData {
                number: number.0,
                severity: event.severity.as_str(),
                text: &event.text,
                job: event.job.map(|job| job.0),
                data: &event.data,
            },
        });
    }

    pub fn gap(&mut self, stream: Stream, gap: Gap, now: Timestamp) {
        let prefix = match stream {
            Stream::Events => self.log,
            Stream::Statistics => "statistics",
        };
        self.push(&Envelope {
            specversion: "1.0",
            id: format!("{prefix}-gap-{}", gap.from),
            source: self.source,
            kind: "dom0d.gap".to_owned(),
            subject: stream.as_str().to_owned(),
            time: now.to_string(),
            sequence: None,
            severity: None,
            traceparent: None,
            datacontenttype: "application/json",
            data: GapData { stream: stream.as_str(), from: gap.from, to: gap.to },
        });
    }

    /// What one object's figures were at a moment. The number is that moment too, unless the clock was set back.
    pub fn sample(&mut self, (number, at): (u64, Timestamp), interval_s: u32, object: &ObjectFigures) {
        self.push(&Envelope {
            specversion: "1.0",
            id: format!("{number}-{}", object.object),
            source: self.source,
            kind: "dom0d.statistics".to_owned(),
            subject: object.object.to_string(),
            time: at.to_string(),
            sequence: Some(number.to_string()),
            severity: None,
            traceparent: None,
            datacontenttype: "application/json",
            data: SampleData {
                name: &object.name,
                domid: object.domid.map(|domid| domid.0),
                interval_s,
                figures: Figures(&object.figures),
            },
        });
    }

    /// A word that asks for nothing but an answer.
    pub fn test(&mut self, stream: Stream, now: Timestamp) {
        self.push(&Envelope {
            specversion: "1.0",
            id: format!("test-{}", now.0),
            source: self.source,
            kind: "dom0d.test".to_owned(),
            subject: stream.as_str().to_owned(),
            time: now.to_string(),
            sequence: None,
            severity: None,
            traceparent: None,
            datacontenttype: "application/json",
            data: serde_json::json!({ "text": "dom0ctl manager test: nothing is to be done" }),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::kind;
    use crate::model::JobId;
    use crate::stats::{MetricId, Object};
    use crate::xen::DomId;
    use serde_json::{Value, json};

    fn written(body: Body<'_>) -> Value {
        serde_json::from_slice(&body.finish()).unwrap()
    }

    #[test]
    fn an_event_is_a_cloudevent_with_all_that_it_says() {
        let mut event = Event::new(kind::VM_CRASHED, "vm/1", "VM 1 crashed: \"no\nreason\"")
            .with_job(JobId(7))
            .with("reason", "crash");
        event.time = Timestamp(1_700_000_000_123);
        let mut body = Body::new("urn:uuid:5", "ab12");
        body.event(EventNumber(42), &event);
        assert_eq!(
            written(body),
            json!([{
                "specversion": "1.0", "id": "ab12-42", "source": "urn:uuid:5", "type": "dom0d.vm.crashed",
                "subject": "vm/1", "time": event.time.to_string(), "sequence": "42", "severity": "error",
                "datacontenttype": "application/json",
                "data": {"number": 42, "severity": "error", "text": "VM 1 crashed: \"no\nreason\"", "job": 7,
                         "data": {"reason": "crash"}},
            }])
        );
    }

    #[test]
    fn a_sample_names_its_metrics_and_a_gap_its_range() {
        let figure = |name: &str, instance: Option<&str>, value| Figure {
            metric: MetricId::parse(name).unwrap(),
            instance: instance.map(Into::into),
            value,
        };
        let object = ObjectFigures {
            object: Object::Domain(DomId(3)),
            name: "odd".into(),
            domid: Some(DomId(3)),
            figures: vec![figure("cpu_time", None, 1.5), figure("vif_rx_bytes", Some("vif3.0"), 12.0)],
        };
        let mut body = Body::new("urn:uuid:5", "ab12");
        body.gap(Stream::Statistics, Gap { from: 5, to: 9 }, Timestamp(10));
        body.sample((10, Timestamp(10)), 20, &object);
        let list = written(body);
        assert_eq!(list[0]["id"], "statistics-gap-5");
        assert_eq!(list[0]["data"], json!({"stream": "statistics", "from": 5, "to": 9}));
        assert_eq!(list[1]["id"], "10-domain/3");
        assert_eq!(
            list[1]["data"]["figures"],
            json!([{"metric": "cpu_time", "value": 1.5}, {"metric": "vif_rx_bytes", "instance": "vif3.0", "value": 12.0}])
        );
    }

    #[test]
    fn a_body_cut_back_is_the_body_of_before() {
        let event = Event::new(kind::VM_STARTED, "vm/1", "VM 1 started");
        let mut body = Body::new("s", "l");
        assert!(body.is_empty());
        body.event(EventNumber(1), &event);
        let len = body.len();
        body.event(EventNumber(2), &event);
        body.cut_back(len);
        assert_eq!(written(body).as_array().unwrap().len(), 1);
    }
}
