//! Real data: Debian's own package index, as apt has it.

use std::process::Command;

/// Every stanza of `apt-cache dumpavail` under `package/version/architecture`.
///
/// Panics where there is no apt or its index is empty: a tier that can't run says so.
pub fn debian() -> Vec<(String, String)> {
    let output = Command::new("apt-cache")
        .arg("dumpavail")
        .output()
        .expect("apt-cache is needed for its package index: run this tier on Debian");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut packages = std::collections::BTreeMap::new();
    for stanza in text.split("\n\n").filter(|s| !s.trim().is_empty()) {
        let field = |name: &str| stanza.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("-").trim();
        let key = format!("{}/{}/{}", field("Package:"), field("Version:"), field("Architecture:"));
        packages.insert(key, stanza.to_owned());
    }
    assert!(
        packages.len() > 50_000,
        "apt's package index has {} packages, not over 50,000: run `apt-get update` first",
        packages.len()
    );
    packages.into_iter().collect()
}
