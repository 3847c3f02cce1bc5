//! What must not be taken: each file in bad/ says in its first line which words are to be heard.

use anyhow::{Context as _, ensure};

use crate::base::{Run, checkout};

const SAYS: &str = "# says: ";

pub fn each_bad_yaml(run: &mut Run) -> anyhow::Result<()> {
    let folder = checkout().join("tests/e2e/bad");
    let mut files: Vec<_> = std::fs::read_dir(&folder)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    ensure!(!files.is_empty(), "{} is empty", folder.display());
    for file in &files {
        let text = std::fs::read_to_string(file)?;
        let name = file.display().to_string();
        let says = text.lines().next().and_then(|line| line.strip_prefix(SAYS));
        let says = says.with_context(|| format!("{name} must begin with {SAYS}"))?;
        let answer = run.kube.try_ctl(60, &["apply", "-f", &name])?;
        ensure!(!answer.ok, "{name} was taken: {}", answer.words());
        let words = answer.words();
        ensure!(words.contains(says), "{name} is refused with {words:?}, not with {says:?}");
    }
    run.say(format!("{} files", files.len()));
    Ok(())
}
