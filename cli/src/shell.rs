//! `vasto shell`: the same commands at a prompt, parsed by the same
//! definitions, with history, completion and a keyspace to stay in.

use std::ffi::OsString;
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use crossterm::style::Color;
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{CompletionType, Config, Editor, Helper, Highlighter, Hinter, Validator};
use tokio::runtime::Runtime;

use crate::Cli;
use crate::context::{Context, Global};
use crate::exit::{Code, code_of, one_line};
use crate::output::{emit, paint};

/// Commands whose first argument is a keyspace, which `use` fills in.
const IN_KEYSPACE: [&str; 13] =
    ["put", "get", "delete", "scan", "add", "append", "max", "min", "load", "dump", "check", "locate", "bench"];
/// Commands that run until stopped, or would start a shell in the shell.
const OUTSIDE: [&str; 4] = ["up", "operator", "store", "shell"];
/// Words of the shell's own.
const OWN: [&str; 4] = ["use", "help", "exit", "quit"];

/// What one line asks for.
#[derive(Debug, PartialEq)]
enum Line {
    Nothing,
    Use(Option<String>),
    Help,
    Exit,
    /// Arguments for the command line's own parser.
    Run(Vec<String>),
}

/// Cuts a line into words: quotes hold words together, a backslash takes the next character as it is.
fn words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some(q) if q == c => break,
                        Some('\\') if c == '"' => match chars.next() {
                            Some(next @ ('"' | '\\')) => word.push(next),
                            Some(next) => word.extend(['\\', next]),
                            None => return Err(format!("the quote {c} is not closed")),
                        },
                        Some(other) => word.push(other),
                        None => return Err(format!("the quote {c} is not closed")),
                    }
                }
            }
            '\\' => match chars.next() {
                Some(next) => word.get_or_insert_default().push(next),
                None => return Err("the line ends in a lone backslash".into()),
            },
            '#' if word.is_none() => break,
            space if space.is_whitespace() => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    Ok(words)
}

/// What a line means while `keyspace` is in use.
fn meaning(line: &str, keyspace: Option<&str>) -> Result<Line, String> {
    let mut words = words(line)?;
    let Some(first) = words.first() else { return Ok(Line::Nothing) };
    match (first.as_str(), words.len()) {
        ("exit" | "quit", _) => Ok(Line::Exit),
        ("help" | "?", 1) => Ok(Line::Help),
        ("use", 1 | 2) => Ok(Line::Use(words.pop().filter(|w| w != "use"))),
        ("use", _) => Err("use takes one name: use KEYSPACE, or use alone to leave it".into()),
        (outside, _) if OUTSIDE.contains(&outside) => {
            Err(format!("{outside} does not run in the shell; run \"vasto {outside}\" outside of it"))
        }
        (verb, _) => {
            if let Some(keyspace) = keyspace
                && IN_KEYSPACE.contains(&verb)
            {
                words.insert(1, keyspace.to_string());
            }
            Ok(Line::Run(words))
        }
    }
}

/// Reads and runs commands until the input ends; the code of the last failure where it is a script.
pub(crate) fn run(runtime: &Runtime, global: Global) -> anyhow::Result<Code> {
    let mut session = Session { runtime, context: Context::new(global.clone(), true), keyspace: None };
    if !std::io::stdin().is_terminal() {
        for line in std::io::stdin().lock().lines() {
            match session.line(&line?) {
                Next::Go(Code::Ok) => {}
                // A script goes no further than its first failure.
                Next::Go(code) => return Ok(code),
                Next::Exit => break,
            }
        }
        return Ok(Code::Ok);
    }

    let config = Config::builder()
        .history_ignore_space(true)
        .completion_type(CompletionType::List)
        .auto_add_history(true)
        .build();
    let mut editor: Editor<Prompt<'_>, DefaultHistory> = Editor::with_config(config)?;
    let history = history_file();
    if let Some(path) = &history {
        if let Some(folder) = path.parent() {
            let _ = std::fs::create_dir_all(folder);
        }
        let _ = editor.load_history(path); // there is none at first
    }
    println!(
        "vasto {}, operator {}. help lists the commands; exit ends.",
        env!("CARGO_PKG_VERSION"),
        session.context.global.operator
    );
    let (context, files) = (Context::new(global, true), FilenameCompleter::new());
    editor.set_helper(Some(Prompt { runtime, context, keyspace_in_use: false, files }));
    loop {
        if let Some(prompt) = editor.helper_mut() {
            prompt.keyspace_in_use = session.keyspace.is_some();
        }
        let name = session.keyspace.as_deref().unwrap_or_default();
        let prompt = format!("vasto{}{name}> ", if name.is_empty() { "" } else { ":" });
        let line = editor.readline(&(prompt.as_str(), paint(&prompt, Color::Cyan).as_str()));
        match line {
            Ok(line) => {
                if matches!(session.line(&line), Next::Exit) {
                    break;
                }
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error.into()),
        }
    }
    if let Some(path) = &history {
        let _ = editor.save_history(path);
    }
    Ok(Code::Ok)
}

/// Where the history is kept (<https://specifications.freedesktop.org/basedir-spec>).
fn history_file() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(state.join("vasto/history"))
}

enum Next {
    Go(Code),
    Exit,
}

struct Session<'a> {
    runtime: &'a Runtime,
    context: Context,
    keyspace: Option<String>,
}

impl Session<'_> {
    /// Runs one line and prints what comes of it.
    fn line(&mut self, line: &str) -> Next {
        let words = match meaning(line, self.keyspace.as_deref()) {
            Ok(Line::Nothing) => return Next::Go(Code::Ok),
            Ok(Line::Exit) => return Next::Exit,
            Ok(Line::Help) => {
                let _ = emit(help());
                return Next::Go(Code::Ok);
            }
            Ok(Line::Use(name)) => return Next::Go(self.enter(name)),
            Ok(Line::Run(words)) => words,
            Err(message) => {
                eprintln!("error: {message}");
                return Next::Go(Code::Usage);
            }
        };
        let arguments = std::iter::once("vasto".to_string()).chain(words).map(OsString::from);
        let cli = match Cli::try_parse_from(arguments) {
            Ok(cli) => cli,
            Err(error) => {
                let _ = error.print();
                return Next::Go(if error.use_stderr() { Code::Usage } else { Code::Ok });
            }
        };
        // Where and how long is the session's to say; how to print is each line's.
        let output = std::mem::replace(&mut self.context.global.output, cli.global.output);
        if self.context.global.output.is_none() {
            self.context.global.output = output;
        }
        let result = self.runtime.block_on(crate::run_until_interrupted(&self.context, cli.command));
        self.context.global.output = output;
        Next::Go(crate::report(&result))
    }

    fn enter(&mut self, name: Option<String>) -> Code {
        if let Some(name) = &name
            && let Err(error) = self.runtime.block_on(self.context.keyspace(name))
        {
            eprintln!("error: {}", one_line(&error));
            return code_of(&error);
        }
        self.keyspace = name;
        Code::Ok
    }
}

fn help() -> String {
    let mut text = String::from("Commands (help COMMAND says more):\n");
    for command in Cli::command().get_subcommands().filter(|c| !OUTSIDE.contains(&c.get_name()) && !c.is_hide_set()) {
        text += &format!(
            "  {:<10}{}\n",
            command.get_name(),
            command.get_about().map(|a| a.to_string()).unwrap_or_default()
        );
    }
    text += "  use       Stay in a keyspace: commands then leave its name out. Alone: leave it\n";
    text += "  exit      End the shell\n\nWords may stand in quotes. --output json and the like work on each line.\n";
    text
}

/// What the line editor asks while a line is being typed.
#[derive(Helper, Highlighter, Hinter, Validator)]
struct Prompt<'a> {
    runtime: &'a Runtime,
    context: Context,
    keyspace_in_use: bool,
    files: FilenameCompleter,
}

/// What may stand at the end of a line.
#[derive(Debug, PartialEq)]
enum Expected {
    Words(Vec<String>),
    Keyspace,
    File,
    Anything,
}

/// What the last word of a line may be, given the words before it.
fn expected(before: &[&str], word: &str, keyspace_in_use: bool) -> Expected {
    let cli = Cli::command();
    let Some((verb, mut rest)) = before.split_first() else {
        let names = cli.get_subcommands().filter(|c| !c.is_hide_set()).map(|c| c.get_name().to_string());
        let mut names: Vec<String> = names.filter(|n| !OUTSIDE.contains(&n.as_str())).collect();
        names.extend(OWN.map(String::from));
        names.sort();
        names.dedup();
        return Expected::Words(names);
    };
    if *verb == "use" {
        return Expected::Keyspace;
    }
    if *verb == "help" {
        return expected(&[], word, keyspace_in_use);
    }
    let Some(mut command) = cli.find_subcommand(verb) else { return Expected::Anything };
    if command.has_subcommands() {
        let Some((verb, more)) = rest.split_first() else {
            return Expected::Words(command.get_subcommands().map(|c| c.get_name().to_string()).collect());
        };
        let Some(found) = command.find_subcommand(verb) else { return Expected::Anything };
        (command, rest) = (found, more);
    }
    if word.starts_with('-') {
        let longs = command.get_arguments().chain(cli.get_arguments().filter(|a| a.is_global_set()));
        return Expected::Words(longs.filter_map(|a| Some(format!("--{}", a.get_long()?))).collect());
    }
    let takes_value = |flag: &&str| {
        let argument =
            command.get_arguments().find(|a| a.get_long().is_some_and(|l| flag.strip_prefix("--") == Some(l)));
        argument.is_some_and(|a| a.get_action().takes_values())
    };
    if let Some(flag) = rest.last().filter(|w| takes_value(w)) {
        return if *flag == "--file" { Expected::File } else { Expected::Anything };
    }
    let mut position = rest.iter().filter(|w| !w.starts_with('-')).count();
    position -= rest.iter().filter(|w| takes_value(w)).count().min(position);
    if keyspace_in_use && IN_KEYSPACE.contains(verb) {
        position += 1;
    }
    match command.get_positionals().nth(position).map(|a| a.get_id().as_str()) {
        Some("keyspace" | "name") => Expected::Keyspace,
        Some("file") => Expected::File,
        _ => Expected::Anything,
    }
}

impl Completer for Prompt<'_> {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        editor: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let typed = &line[..pos];
        let start = typed.rfind(char::is_whitespace).map_or(0, |at| at + 1);
        let (before, word) = typed.split_at(start);
        let before: Vec<&str> = before.split_whitespace().collect();
        let candidates = match expected(&before, word, self.keyspace_in_use) {
            Expected::Words(words) => words,
            Expected::Keyspace => {
                // A prompt that hangs is worse than one that completes nothing.
                let wait = Duration::from_millis(500);
                let all = crate::keyspace::all(&self.context);
                let all = self.runtime.block_on(async { tokio::time::timeout(wait, all).await });
                let all = all.ok().and_then(Result::ok).unwrap_or_default();
                all.iter().map(|k| k.name().to_string()).collect()
            }
            Expected::File => return self.files.complete(line, pos, editor),
            Expected::Anything => Vec::new(),
        };
        let matching = candidates.into_iter().filter(|c| c.starts_with(word));
        Ok((start, matching.map(|c| Pair { display: c.clone(), replacement: format!("{c} ") }).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_quotes() {
        assert_eq!(words(r#"put p 'a b' "c \"d\"" e\ f # note"#).unwrap(), ["put", "p", "a b", "c \"d\"", "e f"]);
        assert_eq!(words("put p '' x#y").unwrap(), ["put", "p", "", "x#y"]);
        assert!(words("put 'a").is_err());
        assert!(words("put a\\").is_err());
    }

    #[test]
    fn a_keyspace_in_use_is_filled_in() {
        let run = |words: &[&str]| Line::Run(words.iter().map(|w| w.to_string()).collect());
        assert_eq!(meaning("get bash", Some("packages")), Ok(run(&["get", "packages", "bash"])));
        assert_eq!(meaning("get packages bash", None), Ok(run(&["get", "packages", "bash"])));
        assert_eq!(meaning("keyspace list", Some("packages")), Ok(run(&["keyspace", "list"])));
        assert_eq!(meaning("use packages", None), Ok(Line::Use(Some("packages".into()))));
        assert_eq!(meaning("use", Some("packages")), Ok(Line::Use(None)));
        assert_eq!(meaning("  # nothing", None), Ok(Line::Nothing));
        assert!(meaning("up", None).is_err());
    }

    #[test]
    fn what_can_be_completed() {
        let Expected::Words(first) = expected(&[], "", false) else { panic!() };
        assert!(first.contains(&"get".to_string()) && first.contains(&"use".to_string()));
        assert!(!first.contains(&"up".to_string()));
        assert_eq!(expected(&["get"], "", false), Expected::Keyspace);
        assert_eq!(expected(&["get"], "", true), Expected::Anything);
        assert_eq!(expected(&["load", "packages"], "", false), Expected::File);
        assert_eq!(expected(&["load", "packages", "--format", "tsv"], "", false), Expected::File);
        assert_eq!(expected(&["keyspace", "scale"], "", false), Expected::Keyspace);
        let Expected::Words(verbs) = expected(&["keyspace"], "", false) else { panic!() };
        assert!(verbs.contains(&"describe".to_string()));
        let Expected::Words(flags) = expected(&["put"], "--", false) else { panic!() };
        assert!(flags.contains(&"--ttl".to_string()) && flags.contains(&"--output".to_string()));
    }
}
