//! A sweep: all figures of all objects at one moment.

use super::metric::MetricId;
use crate::model::{Timestamp, VmId};
use crate::xen::DomId;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// What has figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Object {
    Host,
    Dom0,
    Vm(VmId),
    /// A domain that is no VM of ours.
    Domain(DomId),
}

/// `host`, `dom0`, `vm/<uuid>`, `domain/<domid>`: as in events and locks.
impl std::fmt::Display for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Dom0 => f.write_str("dom0"),
            Self::Vm(vm) => write!(f, "vm/{vm}"),
            Self::Domain(domid) => write!(f, "domain/{}", domid.0),
        }
    }
}

impl Object {
    /// What [`Display`](std::fmt::Display) writes.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "host" => Some(Self::Host),
            "dom0" => Some(Self::Dom0),
            _ => match text.split_once('/')? {
                ("vm", id) => VmId::parse(id).ok().map(Self::Vm),
                ("domain", id) => id.parse().ok().map(|id| Self::Domain(DomId(id))),
                _ => None,
            },
        }
    }
}

/// One value. Counters stand as their source has them, in the metric's unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    pub metric: MetricId,
    /// Of a metric that has instances: which one (`eth0`, `0`, `51712`). At most 64 bytes, and never a guest's word. A vif
    /// is called by its number, or by the name that was chosen for it, so that it is the same when its VM starts again.
    pub instance: Option<Arc<str>>,
    /// Never NaN and never infinite: a figure that is not known is not there.
    pub value: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ObjectFigures {
    pub object: Object,
    /// The domain's name, or the host's.
    pub name: Arc<str>,
    /// Of a domain. Another one of the same object means that its counters began anew.
    pub domid: Option<DomId>,
    /// In the order of the metrics, then of the instances.
    pub figures: Vec<Figure>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Sweep {
    pub at: Timestamp,
    /// The same moment on the clock that is never set.
    pub instant: Instant,
    pub took: Duration,
    /// In the order of [`Object`].
    pub objects: Vec<ObjectFigures>,
    /// Sources that could not be read, with why; their figures are not there. At most one a source.
    pub problems: Vec<(&'static str, String)>,
}

impl Sweep {
    /// One before the first: of no moment, with nothing in it.
    pub fn none() -> Self {
        Self {
            at: Timestamp(0),
            instant: Instant::now(),
            took: Duration::ZERO,
            objects: Vec::new(),
            problems: Vec::new(),
        }
    }

    pub fn object(&self, object: Object) -> Option<&ObjectFigures> {
        let place = self.objects.binary_search_by_key(&object, |one| one.object).ok()?;
        self.objects.get(place)
    }
}

impl ObjectFigures {
    /// The value of this metric, and of this instance if it has several.
    pub fn value(&self, metric: &str, instance: Option<&str>) -> Option<f64> {
        let metric = MetricId::parse(metric)?;
        let is_it = |figure: &&Figure| figure.metric == metric && figure.instance.as_deref() == instance;
        self.figures.iter().find(is_it).map(|figure| figure.value)
    }
}
