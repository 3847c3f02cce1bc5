//! What one connection has chosen, and its commands carried out: neighbours that don't touch the same keys go to
//! the map as one batch.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write;
use std::hash::BuildHasher;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use vasto_client::{Error, Keyspace, Op, Outcome, ScanOptions};

use super::command::{Command, Scan, Shape, Touch, refused};
use super::pattern;
use super::reply::{Reply, Version};
use super::request::Words;
use super::table;
use crate::door::CONNECTIONS;
use crate::metrics::Protocol;
use crate::{Gateway, batch};

/// The Redis that this most resembles, for clients that ask before they use what a version has.
const REDIS_VERSION: &str = "7.2.0";
/// The most bytes of values in one answer.
const MAX_ANSWER: usize = 64 << 20;
/// How long DBSIZE may count.
const COUNTING: Duration = Duration::from_secs(10);
/// The longest name of a connection, and of a library.
const MAX_NAME: usize = 256;

/// One connection's choices.
pub(super) struct Session<'a> {
    gateway: &'a Gateway,
    id: u64,
    version: Version,
    name: Bytes,
    library: (Bytes, Bytes),
    /// As SELECT named it; none: the default one.
    selected: Option<String>,
    keyspace: Option<Keyspace>,
    /// Values that a batch of reads may ask for.
    reads: usize,
    quit: bool,
}

/// Commands that are carried out together.
struct Group {
    ops: Vec<Op>,
    items: Vec<Item>,
    /// By the keys' hashes: two keys of one hash are only kept apart without need.
    touched: HashMap<u64, Touch, foldhash::fast::RandomState>,
    values: usize,
}

enum Item {
    /// So many operations, answered so.
    Asked(Shape, usize),
    Said(Reply),
}

impl Group {
    /// For about so many commands.
    fn with_room(commands: usize) -> Self {
        Self {
            ops: Vec::with_capacity(commands),
            items: Vec::with_capacity(commands),
            touched: HashMap::with_capacity_and_hasher(commands, foldhash::fast::RandomState::default()),
            values: 0,
        }
    }

    fn hash(&self, op: &Op) -> u64 {
        self.touched.hasher().hash_one(op.key())
    }

    /// Whether these operations may go with those that are in it already.
    fn takes(&self, ops: &[Op], shape: Shape, reads: usize) -> bool {
        let beside = |op: &Op| match self.touched.get(&self.hash(op)) {
            None => true,
            Some(touch) => *touch == shape.touch && *touch != Touch::Write,
        };
        self.ops.is_empty() || ((!shape.holds_values() || self.values + ops.len() <= reads) && ops.iter().all(beside))
    }

    fn add(&mut self, ops: Vec<Op>, shape: Shape) {
        for op in &ops {
            self.touched.insert(self.hash(op), shape.touch);
        }
        self.values += if shape.holds_values() { ops.len() } else { 0 };
        self.items.push(Item::Asked(shape, ops.len()));
        self.ops.extend(ops);
    }
}

impl<'a> Session<'a> {
    pub(super) fn new(gateway: &'a Gateway, id: u64) -> Self {
        Self {
            gateway,
            id,
            version: Version::default(),
            name: Bytes::new(),
            library: Default::default(),
            selected: None,
            keyspace: None,
            reads: batch::FIRST_READS,
            quit: false,
        }
    }

    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Whether the client has said goodbye.
    pub(super) fn has_quit(&self) -> bool {
        self.quit
    }

    /// Carries out the next command, with as many behind it as can go with it; says how many failed.
    pub(super) async fn step(&mut self, commands: &mut VecDeque<Result<Command, Reply>>, out: &mut BytesMut) -> usize {
        let mut group = Group::with_room(commands.len().min(128));
        while let Some(next) = commands.front() {
            match next {
                Err(_) => {}
                Ok(Command::Map(asked)) if group.takes(&asked.ops, asked.shape, self.reads) => {}
                Ok(_) => break,
            }
            match commands.pop_front() {
                Some(Err(reply)) => group.items.push(Item::Said(reply)),
                Some(Ok(Command::Map(asked))) => group.add(asked.ops, asked.shape),
                _ => {}
            }
        }
        if !group.items.is_empty() {
            return self.carry_out(group, out).await;
        }
        let reply = match commands.pop_front() {
            Some(Ok(Command::Scan(scan))) => self.scan(scan).await,
            Some(Ok(Command::Size)) => self.size().await,
            Some(Ok(Command::Session(name, words))) => self.session(name, words).await,
            _ => return 0,
        };
        reply.encode(self.version, out);
        usize::from(matches!(reply, Reply::Error(_)))
    }

    async fn carry_out(&mut self, group: Group, out: &mut BytesMut) -> usize {
        let Group { ops, items, .. } = group;
        let mut outcomes = self.batch(ops).await.into_iter();
        let now_ms = self.gateway.env.now_ms();
        let mut failed = 0;
        for item in items {
            let reply = match item {
                Item::Said(reply) => reply,
                Item::Asked(shape, count) => shape.reply(outcomes.by_ref().take(count), now_ms),
            };
            failed += usize::from(matches!(reply, Reply::Error(_)));
            reply.encode(self.version, out);
        }
        failed
    }

    /// The operations' outcomes; of values no more than one answer may have.
    async fn batch(&mut self, ops: Vec<Op>) -> Vec<Result<Outcome, Error>> {
        if ops.is_empty() {
            return Vec::new();
        }
        let count = ops.len();
        let keyspace = match self.keyspace().await {
            Ok(keyspace) => keyspace,
            Err(error) => return vec![Err(error); count],
        };
        batch::carry_out(&keyspace, ops, MAX_ANSWER, &mut self.reads).await
    }

    /// The keyspace that the connection is at.
    async fn keyspace(&mut self) -> Result<Keyspace, Error> {
        if let Some(keyspace) = self.keyspace.as_ref().filter(|keyspace| !keyspace.is_gone()) {
            return Ok(keyspace.clone());
        }
        let opened = match &self.selected {
            Some(name) => self.gateway.maps.open(name).await?,
            None => self.gateway.maps.default().await?,
        };
        Ok(self.keyspace.insert(opened).clone())
    }

    async fn scan(&mut self, scan: Scan) -> Reply {
        let cursors = &self.gateway.redis.cursors;
        let mut options = ScanOptions::new().limit(scan.count).head();
        if let Some(pattern) = &scan.pattern {
            options = options.prefix(Bytes::copy_from_slice(pattern::prefix(pattern)));
        }
        if scan.cursor != 0 {
            match cursors.lock().unwrap_or_else(PoisonError::into_inner).get(scan.cursor) {
                Some(key) => options = options.after(key),
                None => return Reply::error("invalid cursor: this gateway does not know it (any more); begin with 0"),
            }
        }
        let keyspace = match self.keyspace().await {
            Ok(keyspace) => keyspace,
            Err(error) => return refused(&error),
        };
        let mut found = keyspace.scan(options);
        let (mut keys, mut looked, mut last) = (Vec::new(), 0, None);
        while let Some(entry) = found.next().await {
            let key = match entry {
                Ok(entry) => entry.key,
                Err(error) => return refused(&error),
            };
            looked += 1;
            let fits = scan.pattern.as_ref().is_none_or(|pattern| pattern::matches(pattern, &key));
            if fits && !scan.none {
                keys.push(Reply::Bulk(key.clone()));
            }
            last = Some(key);
        }
        let cursor = match last {
            Some(last) if looked >= scan.count => {
                let random = self.gateway.env.random_id();
                cursors.lock().unwrap_or_else(PoisonError::into_inner).add(last, random)
            }
            _ => 0,
        };
        Reply::Array(vec![Reply::text(cursor.to_string()), Reply::Array(keys)])
    }

    async fn size(&mut self) -> Reply {
        let keyspace = match self.keyspace().await {
            Ok(keyspace) => keyspace,
            Err(error) => return refused(&error),
        };
        let count = async {
            let mut found = keyspace.scan(ScanOptions::new().head());
            let mut count = 0;
            while let Some(entry) = found.next().await {
                if let Err(error) = entry {
                    return refused(&error);
                }
                count += 1;
            }
            Reply::Integer(count)
        };
        tokio::time::timeout(COUNTING, count).await.unwrap_or_else(|_| {
            Reply::error(format!(
                "counting takes more than {} s: the metrics of the stores tell about how many records there are",
                COUNTING.as_secs()
            ))
        })
    }

    async fn session(&mut self, name: &str, words: Words) -> Reply {
        match name {
            "ping" => match words.as_slice() {
                [] => Reply::Simple("PONG"),
                [said] => Reply::Bulk(said.clone()),
                _ => wrong_number("ping"),
            },
            "echo" => words.into_iter().next().map_or(Reply::Null, Reply::Bulk),
            "quit" => {
                self.quit = true;
                Reply::OK
            }
            "reset" => {
                *self = Self::new(self.gateway, self.id);
                Reply::Simple("RESET")
            }
            "select" => self.select(&words[0]).await,
            "hello" => self.hello(&words),
            "auth" => match words.as_slice() {
                [user, _] => authenticate(user).unwrap_or(Reply::OK),
                [_] => Reply::error(NO_PASSWORDS),
                _ => Reply::error("syntax error"),
            },
            "client" => self.client(&words),
            "command" => commands(&words),
            "config" => config(&words),
            "info" => Reply::text(self.info(&words)),
            "time" => {
                let now_ms = self.gateway.env.now_ms();
                let (seconds, micros) = (now_ms / 1000, now_ms % 1000 * 1000);
                Reply::Array(vec![Reply::text(seconds.to_string()), Reply::text(micros.to_string())])
            }
            other => Reply::error(format!("'{other}' is not served")),
        }
    }

    async fn select(&mut self, name: &[u8]) -> Reply {
        // Clients that know only numbers say 0 for what they begin with.
        let name = match String::from_utf8_lossy(name).into_owned() {
            zero if zero == "0" => None,
            name => Some(name),
        };
        if let Some(name) = &name {
            match self.gateway.maps.open(name).await {
                Ok(keyspace) => self.keyspace = Some(keyspace),
                Err(error) => return refused(&error),
            }
        } else {
            self.keyspace = None;
        }
        self.selected = name;
        Reply::OK
    }

    fn hello(&mut self, words: &[Bytes]) -> Reply {
        let mut words = words.iter();
        let version = match words.next().map(Bytes::as_ref) {
            None => self.version,
            Some(b"2") => Version::Two,
            Some(b"3") => Version::Three,
            Some(other)
                if std::str::from_utf8(other)
                    .is_ok_and(|other| other.parse::<i64>().is_ok_and(|n| n.to_string() == other)) =>
            {
                return Reply::Error("NOPROTO unsupported protocol version".into());
            }
            Some(_) => return Reply::error("Protocol version is not an integer or out of range"),
        };
        let mut name = None;
        while let Some(word) = words.next() {
            match (word.to_ascii_uppercase().as_slice(), words.as_slice()) {
                (b"AUTH", [user, _, ..]) => {
                    if let Some(refused) = authenticate(user) {
                        return refused;
                    }
                    words.nth(1);
                }
                (b"SETNAME", [given, ..]) => {
                    name = Some(given.clone());
                    words.next();
                }
                _ => return Reply::error(format!("Syntax error in HELLO option '{}'", word.escape_ascii())),
            }
        }
        if let Some(Reply::Error(words)) = name.map(|name| self.set_name(&name)) {
            return Reply::Error(words);
        }
        self.version = version;
        let version = if version == Version::Two { 2 } else { 3 };
        Reply::Map(vec![
            (Reply::text("server"), Reply::text("redis")),
            (Reply::text("version"), Reply::text(REDIS_VERSION)),
            (Reply::text("proto"), Reply::Integer(version)),
            (Reply::text("id"), Reply::Integer(self.id as i64)),
            (Reply::text("mode"), Reply::text("standalone")),
            (Reply::text("role"), Reply::text("master")),
            (Reply::text("modules"), Reply::Array(Vec::new())),
        ])
    }

    fn set_name(&mut self, name: &Bytes) -> Reply {
        if !is_name(name) {
            return Reply::error("Client names cannot contain spaces, newlines or special characters.");
        }
        // Not a part of all that was read with it.
        self.name = Bytes::copy_from_slice(name);
        Reply::OK
    }

    fn client(&mut self, words: &[Bytes]) -> Reply {
        let verb = words[0].to_ascii_uppercase();
        match (verb.as_slice(), &words[1..]) {
            (b"ID", []) => Reply::Integer(self.id as i64),
            (b"GETNAME", []) if self.name.is_empty() => Reply::Null,
            (b"GETNAME", []) => Reply::Bulk(self.name.clone()),
            (b"SETNAME", [name]) => self.set_name(name),
            (b"SETINFO", [what, value]) => {
                if !is_name(value) {
                    return Reply::error("lib-name and lib-ver have up to 256 bytes, without spaces or newlines");
                }
                match what.to_ascii_uppercase().as_slice() {
                    b"LIB-NAME" => self.library.0 = Bytes::copy_from_slice(value),
                    b"LIB-VER" => self.library.1 = Bytes::copy_from_slice(value),
                    _ => return Reply::error(format!("Unrecognized option '{}'", what.escape_ascii())),
                }
                Reply::OK
            }
            (b"LIST", [_, ..]) => Reply::error("syntax error"),
            (b"INFO" | b"LIST", []) => {
                let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
                let (name, lib, ver) = (text(&self.name), text(&self.library.0), text(&self.library.1));
                let (id, keyspace) = (self.id, self.selected.as_deref().unwrap_or_default());
                let resp = if self.version == Version::Two { 2 } else { 3 };
                Reply::text(format!(
                    "id={id} name={name} db=0 resp={resp} lib-name={lib} lib-ver={ver} keyspace={keyspace}\n"
                ))
            }
            (b"NO-EVICT" | b"NO-TOUCH", [mode]) => match mode.to_ascii_uppercase().as_slice() {
                b"ON" | b"OFF" => Reply::OK,
                _ => Reply::error("syntax error"),
            },
            (b"REPLY", [mode]) => match mode.to_ascii_uppercase().as_slice() {
                b"ON" => Reply::OK,
                b"OFF" | b"SKIP" => Reply::error("CLIENT REPLY OFF and SKIP are not served: every command is answered"),
                _ => Reply::error("syntax error"),
            },
            (b"ID" | b"GETNAME" | b"SETNAME" | b"SETINFO" | b"INFO" | b"NO-EVICT" | b"NO-TOUCH" | b"REPLY", _) => {
                wrong_number(&format!("client|{}", String::from_utf8_lossy(&verb).to_ascii_lowercase()))
            }
            (verb, _) => Reply::error(format!(
                "CLIENT {} is not served: ID, GETNAME, SETNAME, SETINFO, INFO and LIST are",
                verb[..verb.len().min(64)].escape_ascii()
            )),
        }
    }

    fn info(&self, sections: &[Bytes]) -> String {
        let all = sections.is_empty()
            || sections
                .iter()
                .any(|s| [&b"all"[..], b"default", b"everything"].contains(&s.to_ascii_lowercase().as_slice()));
        let traffic = self.gateway.counts.of(Protocol::Redis);
        let uptime = self.gateway.env.now_ms().saturating_sub(self.gateway.redis.started_ms) / 1000;
        let connected = traffic.connections.get();
        let accepted = self.gateway.redis.last_id.load(Ordering::Relaxed);
        let parts: [(&str, String); 6] = [
            (
                "Server",
                format!(
                    "redis_version:{REDIS_VERSION}\r\nvasto_version:{}\r\nredis_mode:standalone\r\nprocess_id:{}\r\nuptime_in_seconds:{uptime}\r\n",
                    env!("CARGO_PKG_VERSION"),
                    std::process::id()
                ),
            ),
            ("Clients", format!("connected_clients:{connected}\r\nmaxclients:{CONNECTIONS}\r\n")),
            ("Persistence", "loading:0\r\n".to_owned()),
            (
                "Stats",
                format!("total_connections_received:{accepted}\r\ntotal_commands_processed:{}\r\n", traffic.requests()),
            ),
            ("Replication", "role:master\r\nconnected_slaves:0\r\n".to_owned()),
            ("Cluster", "cluster_enabled:0\r\n".to_owned()),
        ];
        let mut text = String::new();
        for (name, lines) in parts {
            if all || sections.iter().any(|wanted| wanted.eq_ignore_ascii_case(name.as_bytes())) {
                let apart = if text.is_empty() { "" } else { "\r\n" };
                let _ = write!(text, "{apart}# {name}\r\n{lines}");
            }
        }
        text
    }
}

const NO_PASSWORDS: &str =
    "AUTH called without any password configured: this gateway has none. Connect without a password";

/// There is one user, `default`, who needs no password: whichever one is given is right.
fn authenticate(user: &[u8]) -> Option<Reply> {
    (user != b"default").then(|| Reply::Error("WRONGPASS invalid username-password pair or user is disabled.".into()))
}

fn wrong_number(name: &str) -> Reply {
    Reply::error(format!("wrong number of arguments for '{name}' command"))
}

fn is_name(name: &[u8]) -> bool {
    name.len() <= MAX_NAME && name.iter().all(u8::is_ascii_graphic)
}

fn commands(words: &[Bytes]) -> Reply {
    let found = |names: &[Bytes]| -> Vec<_> { names.iter().map(|name| table::find(name)).collect() };
    let Some((verb, names)) = words.split_first() else {
        return Reply::Array(table::TABLE.iter().map(table::Entry::info).collect());
    };
    if names.len() > table::TABLE.len() {
        return Reply::error("COMMAND: more names than there are commands");
    }
    match verb.to_ascii_uppercase().as_slice() {
        b"COUNT" if names.is_empty() => Reply::Integer(table::TABLE.len() as i64),
        b"COUNT" => wrong_number("command|count"),
        b"LIST" => {
            let all = table::TABLE.iter().map(|entry| entry.name);
            let fits = |pattern: &Bytes, name: &str| pattern::matches(&pattern.to_ascii_lowercase(), name.as_bytes());
            let listed: Vec<&str> = match names {
                [] => all.collect(),
                [by, what, pattern]
                    if by.eq_ignore_ascii_case(b"FILTERBY") && what.eq_ignore_ascii_case(b"PATTERN") =>
                {
                    all.filter(|name| fits(pattern, name)).collect()
                }
                _ => return Reply::error("syntax error"),
            };
            Reply::Array(listed.into_iter().map(Reply::text).collect())
        }
        b"INFO" if names.is_empty() => Reply::Array(table::TABLE.iter().map(table::Entry::info).collect()),
        b"INFO" => Reply::Array(found(names).into_iter().map(|e| e.map_or(Reply::Null, table::Entry::info)).collect()),
        b"DOCS" if names.is_empty() => Reply::Map(table::TABLE.iter().map(table::Entry::docs).collect()),
        b"DOCS" => Reply::Map(found(names).into_iter().flatten().map(table::Entry::docs).collect()),
        verb => Reply::error(format!(
            "COMMAND {} is not served: COUNT, LIST, INFO and DOCS are",
            verb[..verb.len().min(64)].escape_ascii()
        )),
    }
}

fn config(words: &[Bytes]) -> Reply {
    if !words[0].eq_ignore_ascii_case(b"get") {
        return Reply::error("CONFIG can only GET here: a keyspace's settings are its Keyspace resource's");
    }
    if words.len() < 2 {
        return wrong_number("config|get");
    }
    let connections = CONNECTIONS.to_string();
    let settings = [
        ("appendonly", "yes"),
        ("databases", "1"),
        ("maxclients", connections.as_str()),
        ("maxmemory", "0"),
        ("proto-max-bulk-len", "8388608"),
        ("save", ""),
        ("timeout", "0"),
    ];
    let wanted = |name: &str| words[1..].iter().any(|p| pattern::matches(&p.to_ascii_lowercase(), name.as_bytes()));
    let told = settings.into_iter().filter(|(name, _)| wanted(name));
    Reply::Map(told.map(|(name, value)| (Reply::text(name), Reply::text(value))).collect())
}
