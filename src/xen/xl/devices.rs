//! Disks and network cards of a living domain. What is plugged is what libxl keeps below `/libxl/<domid>/device`.

use super::run::Leaves;
use super::{Xl, config_file};
use crate::model::Mac;
use crate::xen::config::{Disk, DiskDevice, GuestType, Vif};
use crate::xen::{DomId, Result, ToolstackError};

impl Xl {
    /// The number of the device whose node `key` has this value.
    async fn plugged(&self, domid: DomId, kind: &str, key: &str, value: &str) -> Result<Option<String>> {
        let folder = format!("/libxl/{}/device/{kind}", domid.0);
        for number in self.inner.store.list(&folder).await? {
            let told = self.inner.store.read(&format!("{folder}/{number}/{key}")).await?;
            if told.is_some_and(|told| told.eq_ignore_ascii_case(value.as_bytes())) {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    async fn disk_number(&self, domid: DomId, device: &DiskDevice) -> Result<Option<String>> {
        self.plugged(domid, "vbd", "dev", device.as_str()).await
    }

    async fn vif_number(&self, domid: DomId, mac: Mac) -> Result<Option<String>> {
        self.plugged(domid, "vif", "mac", &mac.as_str()).await
    }

    pub(super) async fn plug_disk(&self, domid: DomId, disk: &Disk) -> Result<()> {
        self.living(domid).await?;
        if self.disk_number(domid, &disk.device).await?.is_some() {
            return Err(ToolstackError::BadState(format!("{} is plugged", disk.device.as_str())));
        }
        let spec = config_file::disk_spec(disk).map_err(|error| ToolstackError::Failed(error.to_string()))?;
        let args = ["block-attach", &domid.0.to_string(), &spec];
        let plugged = self.xl(&args, Leaves::Processes).await;
        if plugged.is_err() {
            // All or nothing: a device that was half plugged goes. That there is none is no matter.
            let _ = self.force_out(domid, "block-detach", disk.device.as_str()).await;
        }
        self.explained(domid, plugged.map(drop)).await
    }

    pub(super) async fn unplug_disk(&self, domid: DomId, device: &DiskDevice) -> Result<()> {
        self.living(domid).await?;
        if self.disk_number(domid, device).await?.is_none() {
            return Err(ToolstackError::BadState(format!("{} is not plugged", device.as_str())));
        }
        let args = ["block-detach", &domid.0.to_string(), device.as_str()];
        let unplugged = self.xl(&args, Leaves::Processes).await;
        self.explained(domid, unplugged.map(drop)).await?;
        match self.disk_number(domid, device).await? {
            None => Ok(()),
            Some(_) => Err(ToolstackError::Failed(format!("the guest holds {}", device.as_str()))),
        }
    }

    pub(super) async fn plug_vif(&self, domid: DomId, vif: &Vif) -> Result<()> {
        self.living(domid).await?;
        if self.vif_number(domid, vif.mac).await?.is_some() {
            return Err(ToolstackError::BadState(format!("{} is plugged", vif.mac)));
        }
        let kind = self.inner.store.read(&format!("/libxl/{}/type", domid.0)).await?;
        let guest = if kind.as_deref() == Some(b"hvm") { GuestType::Hvm } else { GuestType::Pv };
        let spec = config_file::vif_spec(vif, guest);
        let domid_text = domid.0.to_string();
        let mut args = vec!["network-attach", domid_text.as_str()];
        args.extend(spec.split(','));
        let plugged = self.xl(&args, Leaves::Processes).await;
        if plugged.is_err() {
            let _ = self.force_out(domid, "network-detach", &vif.mac.as_str()).await;
        }
        self.explained(domid, plugged.map(drop)).await
    }

    pub(super) async fn unplug_vif(&self, domid: DomId, mac: Mac) -> Result<()> {
        self.living(domid).await?;
        let Some(number) = self.vif_number(domid, mac).await? else {
            return Err(ToolstackError::BadState(format!("{mac} is not plugged")));
        };
        let args = ["network-detach", &domid.0.to_string(), &number];
        let unplugged = self.xl(&args, Leaves::Processes).await;
        self.explained(domid, unplugged.map(drop)).await?;
        match self.vif_number(domid, mac).await? {
            None => Ok(()),
            Some(_) => Err(ToolstackError::Failed(format!("the guest holds {mac}"))),
        }
    }

    async fn force_out(&self, domid: DomId, call: &str, device: &str) -> Result<()> {
        self.xl(&[call, &domid.0.to_string(), device], Leaves::Processes).await.map(drop)
    }
}
