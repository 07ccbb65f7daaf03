//! DHCP for real: busybox's client and server, each in a network namespace of its own.

use crate::kernel::name;
use crate::namespace::{address, done, joined};
use dom0d::kernel::{Dhcp, Kernel};
use dom0d::model::network::Change;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// What Debian's `udhcpc` does with a lease, as far as matters here.
const SCRIPT: &str = r#"#!/bin/sh
case "$1" in
  deconfig) ip address flush dev "$interface" ;;
  bound | renew) ip address replace "$ip/$mask" dev "$interface" ;;
esac
"#;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn program(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_gets_its_address_by_the_hosts_dhcp_client_and_gives_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = |file: &str| folder.path().join(file);
    let (here, there) = joined().await;
    done(&there.kernel(), [address("there0", "192.0.2.1/24")]).await;
    let leases = at("leases");
    fs::write(&leases, "").unwrap();
    let settings = format!(
        "start 192.0.2.20\nend 192.0.2.30\ninterface there0\nlease_file {}\npidfile {}\noption subnet 255.255.255.0\n",
        leases.display(),
        at("udhcpd.pid").display()
    );
    fs::write(at("udhcpd.conf"), settings).unwrap();
    let mut server = Command::new("nsenter");
    server.arg(format!("--net={}", there.path())).args(["busybox", "udhcpd", "-f"]).arg(at("udhcpd.conf"));
    let server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _server = Server(server.expect("nsenter and busybox are installed"));
    program(&at("script"), SCRIPT);
    let client = format!("#!/bin/sh\nexec busybox udhcpc -s {} \"$@\"\n", at("script").display());
    program(&at("udhcpc"), &client);
    let kernel =
        here.kernel().with_dhcp(Dhcp { programs: vec![folder.path().to_owned()], notes: at("notes") });
    let link = name("here0");
    done(&kernel, [Change::SetDhcp { link: link.clone(), on: true }]).await;
    let end = Instant::now() + PATIENCE;
    loop {
        let is = kernel.network().await.unwrap().links[&link].clone();
        assert!(is.dhcp, "its client runs");
        if is.addresses.iter().any(|address| address.contains([192, 0, 2, 1].into())) {
            break;
        }
        assert!(Instant::now() < end, "no lease: {is:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    done(&kernel, [Change::SetDhcp { link: link.clone(), on: false }]).await;
    let is = kernel.network().await.unwrap().links[&link].clone();
    assert!(!is.dhcp && is.addresses.is_empty(), "{is:?}");
}
