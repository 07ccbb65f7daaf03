//! A view that changes are performed on, with the ways through it that changes take: from a controller to its ports, from
//! a link to the VLANs on it, from a link to its routes.
//!
//! With an index these ways are short, and many changes can be foreseen quickly; without one it costs nothing to begin.

use super::{Change, IfName, Kind, LinkView, NetworkView, Refused, Route, VlanId, perform};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone)]
pub struct Ground {
    view: NetworkView,
    index: Option<Index>,
}

#[derive(Debug, Clone, Default)]
struct Index {
    ports: BTreeMap<IfName, BTreeSet<IfName>>,
    vlans: BTreeMap<IfName, BTreeMap<VlanId, BTreeSet<IfName>>>,
    routes: BTreeMap<IfName, BTreeSet<Route>>,
}

impl Index {
    fn of(view: &NetworkView) -> Self {
        let mut index = Self::default();
        for (name, link) in &view.links {
            index.add(name, link);
        }
        for route in &view.routes {
            index.add_route(route);
        }
        index
    }

    fn add(&mut self, name: &IfName, link: &LinkView) {
        if let Some(controller) = &link.controller {
            self.ports.entry(controller.clone()).or_default().insert(name.clone());
        }
        if let Kind::Vlan { parent, id } = &link.kind {
            self.vlans.entry(parent.clone()).or_default().entry(*id).or_default().insert(name.clone());
        }
    }

    fn take(&mut self, name: &IfName, link: &LinkView) {
        if let Some(ports) = link.controller.as_ref().and_then(|controller| self.ports.get_mut(controller)) {
            ports.remove(name);
        }
        if let Kind::Vlan { parent, id } = &link.kind
            && let Some(vlans) = self.vlans.get_mut(parent)
            && let Some(names) = vlans.get_mut(id)
        {
            names.remove(name);
            if names.is_empty() {
                vlans.remove(id);
            }
        }
    }

    fn add_route(&mut self, route: &Route) {
        for link in route.links() {
            self.routes.entry(link.clone()).or_default().insert(route.clone());
        }
    }
}

impl Ground {
    /// With an index.
    pub fn new(view: NetworkView) -> Self {
        let index = Some(Index::of(&view));
        Self { view, index }
    }

    pub(super) fn bare(view: NetworkView) -> Self {
        Self { view, index: None }
    }

    /// Does the change, or leaves all as it was.
    pub fn perform(&mut self, change: &Change) -> Result<(), Refused> {
        perform::on(self, change)
    }

    pub fn view(&self) -> &NetworkView {
        &self.view
    }

    pub fn into_view(self) -> NetworkView {
        self.view
    }

    pub fn link(&self, name: &IfName) -> Option<&LinkView> {
        self.view.links.get(name)
    }

    pub fn ports(&self, controller: &IfName) -> Vec<IfName> {
        match &self.index {
            Some(index) => index.ports.get(controller).into_iter().flatten().cloned().collect(),
            None => self.view.ports(controller).map(|(port, _)| port.clone()).collect(),
        }
    }

    /// The VLANs that stand on the link itself.
    pub fn vlans_on(&self, link: &IfName) -> Vec<IfName> {
        let is_on = |one: &LinkView| matches!(&one.kind, Kind::Vlan { parent, .. } if parent == link);
        match &self.index {
            Some(index) => index
                .vlans
                .get(link)
                .into_iter()
                .flat_map(|vlans| vlans.values().flatten())
                .cloned()
                .collect(),
            None => {
                self.view.links.iter().filter(|(_, one)| is_on(one)).map(|(name, _)| name.clone()).collect()
            }
        }
    }

    pub fn routes_by(&self, link: &IfName) -> Vec<Route> {
        match &self.index {
            Some(index) => index.routes.get(link).into_iter().flatten().cloned().collect(),
            None => self.view.routes.iter().filter(|one| one.links().any(|by| by == link)).cloned().collect(),
        }
    }

    pub(super) fn has_vlan(&self, on: &IfName, asked: VlanId) -> bool {
        match &self.index {
            Some(index) => index.vlans.get(on).is_some_and(|vlans| vlans.contains_key(&asked)),
            None => {
                let is_it = |one: &LinkView| matches!(&one.kind, Kind::Vlan { parent, id } if parent == on && *id == asked);
                self.view.links.values().any(is_it)
            }
        }
    }

    /// For all that no way leads by: not the controller, nor a VLAN's parent and id.
    pub(super) fn link_mut(&mut self, name: &IfName) -> Result<&mut LinkView, Refused> {
        self.view.links.get_mut(name).ok_or(Refused::NoSuchLink)
    }

    pub(super) fn insert(&mut self, name: IfName, link: LinkView) {
        if let Some(index) = &mut self.index {
            index.add(&name, &link);
        }
        self.view.links.insert(name, link);
    }

    pub(super) fn remove(&mut self, name: &IfName) -> Option<LinkView> {
        let link = self.view.links.remove(name)?;
        if let Some(index) = &mut self.index {
            index.take(name, &link);
        }
        Some(link)
    }

    pub(super) fn set_controller(&mut self, name: &IfName, controller: Option<IfName>) {
        let Some(link) = self.view.links.get_mut(name) else { return };
        if let Some(index) = &mut self.index {
            index.take(name, link);
        }
        link.controller = controller;
        if let Some(index) = &mut self.index {
            index.add(name, link);
        }
    }

    pub(super) fn insert_route(&mut self, route: Route) {
        if let Some(index) = &mut self.index {
            index.add_route(&route);
        }
        self.view.routes.insert(route);
    }

    pub(super) fn remove_route(&mut self, route: &Route) {
        self.view.routes.remove(route);
        let Some(index) = &mut self.index else { return };
        for link in route.links() {
            if let Some(routes) = index.routes.get_mut(link) {
                routes.remove(route);
            }
        }
    }
}
