//! The part of the kernel's contract that is about routes.

use crate::kernel::{
    add_address, add_route, address, bridge, create, delete, delete_address, delete_route, done, ip, name,
    pair, refused, route, set_up, view,
};
use dom0d::kernel::Kernel;
use dom0d::model::network::{Hop, NetworkView, Refused, Route};

pub async fn routes_read_back_as_they_were_asked_for(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge()), set_up("kb0", true)]).await;
    done(kernel, [add_address("kb0", "198.51.100.1/24"), add_address("kb0", "2001:db8:1::1/64")]).await;
    let asked = [
        route("203.0.113.0/24", Some("198.51.100.9"), Some("kb0"), 0),
        route("203.0.113.0/24", Some("198.51.100.8"), Some("kb0"), 50),
        route("203.0.112.0/24", None, Some("kb0"), 0),
        route("2001:db8:2::/48", Some("2001:db8:1::9"), Some("kb0"), 0),
        route("2001:db8:2::/48", Some("2001:db8:1::9"), Some("kb0"), 77),
        route("0.0.0.0/0", Some("198.51.100.9"), Some("kb0"), 900),
        route("::/0", Some("2001:db8:1::9"), Some("kb0"), 900),
    ];
    let before = view(kernel).await.routes;
    done(kernel, asked.iter().cloned().map(add_route)).await;
    let mut expected = before.clone();
    expected.extend(asked.iter().map(Route::normal));
    assert_eq!(view(kernel).await.routes, expected);
    // The link is found by the gateway, and what follows the prefix does not count.
    done(kernel, [add_route(route("192.88.99.7/24", Some("198.51.100.9"), None, 3))]).await;
    let found = route("192.88.99.0/24", Some("198.51.100.9"), Some("kb0"), 3);
    assert!(view(kernel).await.routes.contains(&found));
    done(kernel, [delete_route(route("192.88.99.7/24", None, None, 3))]).await;
    refused(kernel, add_route(asked[0].clone()), Refused::Exists).await;
    refused(kernel, add_route(asked[3].clone()), Refused::Exists).await;
    // Of two that differ in their metric alone, the one that is meant goes.
    done(kernel, [delete_route(asked[0].clone()), delete_route(asked[4].clone())]).await;
    refused(kernel, delete_route(asked[0].clone()), Refused::NoSuchRoute).await;
    refused(kernel, delete_route(asked[4].clone()), Refused::NoSuchRoute).await;
    let elsewhere = route("203.0.113.0/24", Some("198.51.100.7"), None, 50);
    refused(kernel, delete_route(elsewhere), Refused::NoSuchRoute).await;
    // The network of an address is the kernel's own route.
    refused(kernel, delete_route(route("198.51.100.0/24", None, Some("kb0"), 0)), Refused::NoSuchRoute).await;
    let unreachable = [route("192.88.98.0/24", Some("203.0.114.1"), Some("kb0"), 0)];
    for one in unreachable {
        refused(kernel, add_route(one), Refused::Unreachable).await;
    }
    refused(kernel, add_route(route("192.88.98.0/24", None, None, 0)), Refused::NoSuchLink).await;
    done(kernel, [delete("kb0")]).await;
    assert_eq!(view(kernel).await.routes, before, "its routes go with the link");
}

pub async fn the_last_ipv4_address_takes_the_links_ipv4_routes_along(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge()), set_up("kb0", true)]).await;
    done(kernel, ["198.51.100.1/24", "203.0.114.1/24"].map(|one| add_address("kb0", one))).await;
    done(kernel, [add_route(route("203.0.113.0/24", Some("198.51.100.9"), None, 0))]).await;
    let has_it = |view: &NetworkView| view.routes.iter().any(|one| one.to == address("203.0.113.0/24"));
    done(kernel, [delete_address("kb0", "198.51.100.1/24")]).await;
    assert!(has_it(&view(kernel).await), "another address is left");
    done(kernel, [delete_address("kb0", "203.0.114.1/24")]).await;
    assert!(!has_it(&view(kernel).await));
}

pub async fn a_gateway_may_be_on_the_link_without_an_address_on_its_network(kernel: &dyn Kernel) {
    done(kernel, [create("kv0", pair("kv1")), set_up("kv0", true), set_up("kv1", true)]).await;
    done(kernel, [add_address("kv0", "198.51.100.7/32"), add_address("kv0", "2001:db8:1::7/128")]).await;
    let before = view(kernel).await.routes;
    let plain = route("203.0.113.0/24", Some("192.88.99.1"), Some("kv0"), 0);
    refused(kernel, add_route(plain.clone()), Refused::Unreachable).await;
    let asked = [
        Route { onlink: true, ..plain },
        // Routers of IPv6 are found by their link-local addresses.
        route("2001:db8:2::/48", Some("fe80::1"), Some("kv0"), 0),
    ];
    done(kernel, asked.iter().cloned().map(add_route)).await;
    let mut expected = before.clone();
    expected.extend(asked.iter().map(Route::normal));
    assert_eq!(view(kernel).await.routes, expected);
    done(kernel, asked.iter().cloned().map(delete_route)).await;
    assert_eq!(view(kernel).await.routes, before);
}

pub async fn a_routes_source_and_table_are_kept_and_the_source_takes_it_along(kernel: &dyn Kernel) {
    done(kernel, [create("kb0", bridge()), set_up("kb0", true)]).await;
    done(kernel, ["198.51.100.1/24", "198.51.100.2/24"].map(|one| add_address("kb0", one))).await;
    let before = view(kernel).await.routes;
    let plain = route("203.0.113.0/24", Some("198.51.100.9"), Some("kb0"), 0);
    let of = |source: &str| Route { source: Some(ip(source)), ..plain.clone() };
    let elsewhere = |table| Route { table, protocol: 12, ..plain.clone() };
    refused(kernel, add_route(of("203.0.114.5")), Refused::NoSuchAddress).await;
    let asked = [of("198.51.100.2"), elsewhere(100), elsewhere(70_000)];
    done(kernel, asked.iter().cloned().map(add_route)).await;
    let mut expected = before.clone();
    expected.extend(asked.iter().cloned());
    assert_eq!(view(kernel).await.routes, expected, "one each in three tables");
    done(kernel, [delete_route(elsewhere(100)), delete_address("kb0", "198.51.100.2/24")]).await;
    let mut expected = before;
    expected.insert(elsewhere(70_000));
    assert_eq!(view(kernel).await.routes, expected);
}

pub async fn a_route_by_several_hops_is_told_whole_and_goes_with_the_last_of_them(kernel: &dyn Kernel) {
    let to = "203.0.113.0/24";
    done(kernel, [create("kb0", bridge()), create("kb1", bridge())]).await;
    done(kernel, [set_up("kb0", true), set_up("kb1", true)]).await;
    done(kernel, [add_address("kb0", "198.51.100.1/24"), add_address("kb1", "192.88.99.1/24")]).await;
    let before = view(kernel).await.routes;
    let hop =
        |via: &str, link: &str, weight| Hop { via: Some(ip(via)), link: name(link), weight, onlink: false };
    let hops = vec![hop("198.51.100.9", "kb0", 1), hop("192.88.99.9", "kb1", 7)];
    let asked = Route { hops, ..Route::new(address(to)) };
    let has_it = |view: &NetworkView| view.routes.contains(&asked);
    done(kernel, [add_route(asked.clone())]).await;
    refused(kernel, add_route(asked.clone()), Refused::Exists).await;
    assert!(has_it(&view(kernel).await), "{:?}", view(kernel).await.routes);
    done(kernel, [delete_route(asked.clone())]).await;
    assert_eq!(view(kernel).await.routes, before);
    done(kernel, [add_route(asked.clone()), set_up("kb0", false)]).await;
    assert!(has_it(&view(kernel).await), "a hop is left");
    done(kernel, [set_up("kb1", false)]).await;
    assert_eq!(view(kernel).await.routes, before);
    done(kernel, [set_up("kb0", true), set_up("kb1", true), add_route(asked.clone()), delete("kb1")]).await;
    assert_eq!(view(kernel).await.routes, before, "a link that is removed takes it along");
    let nowhere = vec![hop("198.51.100.9", "kb0", 1), hop("192.88.99.9", "kb0", 1)];
    refused(kernel, add_route(Route { hops: nowhere, ..Route::new(address(to)) }), Refused::Unreachable)
        .await;
}
