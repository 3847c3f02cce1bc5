//! The commands that are served, as `COMMAND` tells of them.

use super::reply::Reply;

/// A command as clients may ask about it.
pub(super) struct Entry {
    pub(super) name: &'static str,
    /// Words in all, the name too; negative: at least so many.
    pub(super) arity: i64,
    flags: &'static [&'static str],
    /// Where its keys stand: the first, the last (negative: from the end), and the step between them.
    keys: (i64, i64, i64),
    group: &'static str,
    summary: &'static str,
}

const READ: &[&str] = &["readonly", "fast"];
const WRITE: &[&str] = &["write", "denyoom", "fast"];
const REMOVE: &[&str] = &["write", "fast"];
const HERE: &[&str] = &["loading", "stale", "fast"];
const NO_KEY: (i64, i64, i64) = (0, 0, 0);
const ONE: (i64, i64, i64) = (1, 1, 1);
const ALL: (i64, i64, i64) = (1, -1, 1);

const fn entry(
    name: &'static str,
    arity: i64,
    flags: &'static [&'static str],
    keys: (i64, i64, i64),
    group: &'static str,
    summary: &'static str,
) -> Entry {
    Entry { name, arity, flags, keys, group, summary }
}

/// All of them, by name.
pub(super) const TABLE: &[Entry] = &[
    entry("append", 3, WRITE, ONE, "string", "Appends to the bytes of a key; answers their length."),
    entry("auth", -2, HERE, NO_KEY, "connection", "Refused: this server has no passwords."),
    entry("client", -2, HERE, NO_KEY, "connection", "Names and describes this connection."),
    entry("command", -1, HERE, NO_KEY, "server", "Tells which commands there are."),
    entry("config", -2, HERE, NO_KEY, "server", "GET tells a few settings; they can't be set."),
    entry("dbsize", 1, &["readonly"], NO_KEY, "server", "Counts the keys, by reading all of them."),
    entry("decr", 2, WRITE, ONE, "string", "Takes 1 from the number of a key; answers the number."),
    entry("decrby", 3, WRITE, ONE, "string", "Takes a whole number from the number of a key; answers the number."),
    entry("del", -2, REMOVE, ALL, "generic", "Deletes keys; answers how many held something."),
    entry("echo", 2, HERE, NO_KEY, "connection", "Answers its argument."),
    entry("exists", -2, READ, ALL, "generic", "Counts those of these keys that hold something."),
    entry("expire", -3, REMOVE, ONE, "generic", "Lets a key end after so many seconds."),
    entry("expireat", -3, REMOVE, ONE, "generic", "Lets a key end at a time in Unix seconds."),
    entry("expiretime", 2, READ, ONE, "generic", "Tells when a key ends, in Unix seconds."),
    entry("get", 2, READ, ONE, "string", "Reads a key."),
    entry("getdel", 2, REMOVE, ONE, "string", "Reads a key, then deletes it."),
    entry("getex", -2, REMOVE, ONE, "string", "Reads a key and changes when it ends."),
    entry("getrange", 4, READ, ONE, "string", "Reads a part of a key's bytes."),
    entry("getset", 3, WRITE, ONE, "string", "Sets a key; answers what it held."),
    entry("hello", -1, HERE, NO_KEY, "connection", "Chooses the protocol's version, 2 or 3."),
    entry("incr", 2, WRITE, ONE, "string", "Adds 1 to the number of a key; answers the number."),
    entry("incrby", 3, WRITE, ONE, "string", "Adds a whole number to the number of a key; answers the number."),
    entry("incrbyfloat", 3, WRITE, ONE, "string", "Adds to the number of a key; answers the number."),
    entry("info", -1, HERE, NO_KEY, "server", "Tells about this server."),
    entry("mget", -2, READ, ALL, "string", "Reads keys."),
    entry("mset", -3, WRITE, (1, -1, 2), "string", "Sets keys, each by itself."),
    entry("persist", 2, REMOVE, ONE, "generic", "Lets a key never end."),
    entry("pexpire", -3, REMOVE, ONE, "generic", "Lets a key end after so many milliseconds."),
    entry("pexpireat", -3, REMOVE, ONE, "generic", "Lets a key end at a time in Unix milliseconds."),
    entry("pexpiretime", 2, READ, ONE, "generic", "Tells when a key ends, in Unix milliseconds."),
    entry("ping", -1, HERE, NO_KEY, "connection", "Answers PONG, or its argument."),
    entry("psetex", 4, WRITE, ONE, "string", "Sets a key that ends after so many milliseconds."),
    entry("pttl", 2, READ, ONE, "generic", "Tells after how many milliseconds a key ends."),
    entry("quit", -1, HERE, NO_KEY, "connection", "Closes the connection."),
    entry("reset", 1, HERE, NO_KEY, "connection", "Makes the connection as it was when new."),
    entry("scan", -2, &["readonly"], NO_KEY, "generic", "Yields keys, a few at a time."),
    entry("select", 2, HERE, NO_KEY, "connection", "Goes over to a keyspace, by its name; 0 is the default one."),
    entry("set", -3, WRITE, ONE, "string", "Sets a key."),
    entry("setex", 4, WRITE, ONE, "string", "Sets a key that ends after so many seconds."),
    entry("strlen", 2, READ, ONE, "string", "Tells the length of a key's bytes."),
    entry("substr", 4, READ, ONE, "string", "As GETRANGE."),
    entry("time", 1, HERE, NO_KEY, "server", "Tells the time of this server."),
    entry("touch", -2, READ, ALL, "generic", "As EXISTS."),
    entry("ttl", 2, READ, ONE, "generic", "Tells after how many seconds a key ends."),
    entry("type", 2, READ, ONE, "generic", "Tells string or none."),
    entry("unlink", -2, REMOVE, ALL, "generic", "As DEL."),
];

/// The command of this name, in whichever case.
pub(super) fn find(name: &[u8]) -> Option<&'static Entry> {
    let by_name = |entry: &Entry| entry.name.bytes().cmp(name.iter().map(u8::to_ascii_lowercase));
    TABLE.binary_search_by(by_name).ok().map(|at| &TABLE[at])
}

impl Entry {
    /// Whether so many words are right.
    pub(super) fn takes(&self, words: usize) -> bool {
        let words = i64::try_from(words).unwrap_or(i64::MAX);
        if self.arity < 0 { words >= -self.arity } else { words == self.arity }
    }

    /// Whether it names keys.
    pub(super) fn has_keys(&self) -> bool {
        self.keys != NO_KEY
    }

    /// As `COMMAND` tells it.
    pub(super) fn info(&self) -> Reply {
        let (first, last, step) = self.keys;
        Reply::Array(vec![
            Reply::text(self.name),
            Reply::Integer(self.arity),
            Reply::Array(self.flags.iter().map(|flag| Reply::Simple(flag)).collect()),
            Reply::Integer(first),
            Reply::Integer(last),
            Reply::Integer(step),
            Reply::Array(Vec::new()),
            Reply::Array(Vec::new()),
            Reply::Array(Vec::new()),
            Reply::Array(Vec::new()),
        ])
    }

    /// As `COMMAND DOCS` tells it.
    pub(super) fn docs(&self) -> (Reply, Reply) {
        let pairs = [("summary", self.summary), ("since", "1.0.0"), ("group", self.group)];
        let docs = pairs.into_iter().map(|(name, text)| (Reply::text(name), Reply::text(text))).collect();
        (Reply::text(self.name), Reply::Map(docs))
    }
}

/// Why a command that Redis has is not served, for those where that takes more than a word.
pub(super) fn refusal(name: &[u8]) -> Option<&'static str> {
    Some(match name.to_ascii_uppercase().as_slice() {
        b"SETNX" | b"MSETNX" => {
            "two clients could both be told that they were first, on different replicas: \
             an eventually consistent store can't promise NX"
        }
        b"WATCH" | b"UNWATCH" => {
            "there are no transactions: keys live on different stores, and each write counts by itself"
        }
        b"EVAL" | b"EVALSHA" | b"EVAL_RO" | b"EVALSHA_RO" | b"SCRIPT" | b"FUNCTION" | b"FCALL" | b"FCALL_RO" => {
            "there are no scripts: keys live on different stores"
        }
        b"KEYS" => "all keys at once may be more than fits anywhere: use SCAN",
        b"FLUSHDB" | b"FLUSHALL" | b"SWAPDB" => "keyspaces are made and deleted by the operator, not through a gateway",
        b"SETRANGE" | b"SETBIT" | b"BITOP" | b"BITFIELD" => {
            "a part of a value can't be changed in place without losing what other replicas take: SET it whole"
        }
        b"RENAME" | b"RENAMENX" | b"COPY" | b"MOVE" => {
            "two keys can't be changed as one: read the one, write the other"
        }
        b"SUBSCRIBE" | b"PSUBSCRIBE" | b"PUBLISH" | b"SSUBSCRIBE" | b"SPUBLISH" => "there are no channels",
        b"CLUSTER" | b"READONLY" | b"READWRITE" | b"ASKING" => {
            "this is no Redis Cluster: any gateway serves every key, ask it as a single server"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn found_in_any_case_and_sorted() {
        assert!(TABLE.is_sorted_by_key(|entry| entry.name));
        for entry in TABLE {
            assert_eq!(find(entry.name.to_uppercase().as_bytes()).unwrap().name, entry.name);
            assert!(refusal(entry.name.as_bytes()).is_none(), "{}", entry.name);
        }
        assert!(find(b"lpush").is_none());
        let get = find(b"Get").unwrap();
        assert!(get.takes(2) && !get.takes(3) && find(b"DEL").unwrap().takes(9) && !find(b"DEL").unwrap().takes(1));
    }
}
