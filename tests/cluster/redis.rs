//! Redis' commands, case by case: what Redis itself answers is in `tests/gateway/cases.txt`, and where the gateway
//! answers otherwise, what and why.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use vasto_tests::cluster::{Cluster, Gateway};

/// One replica, so that what was answered is what is read next.
const KEYSPACE: &str = "
apiVersion: vasto.io/v1alpha1
kind: Keyspace
metadata: {name: gateway}
spec: {shards: 1, replicationFactor: 1}
";

#[derive(Debug, Default)]
struct Step {
    line: usize,
    command: String,
    redis: Vec<String>,
    ours: Vec<String>,
    why: Option<String>,
    wait: Duration,
}

/// The cases, by name.
fn read(text: &str) -> Vec<(String, Vec<Step>)> {
    let mut cases: Vec<(String, Vec<Step>)> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if let Some(name) = line.strip_prefix("== ") {
            cases.push((name.to_owned(), Vec::new()));
            continue;
        }
        let Some((_, steps)) = cases.last_mut() else { continue };
        let line_number = number + 1;
        if let Some(command) = line.strip_prefix("> ") {
            steps.push(Step { line: line_number, command: command.to_owned(), ..Step::default() });
        } else if let Some(ms) = line.strip_prefix("~ ") {
            steps.push(Step { wait: Duration::from_millis(ms.parse().unwrap()), ..Step::default() });
        } else if let Some(step) = steps.last_mut().filter(|_| !line.is_empty()) {
            match (line.strip_prefix("! why: "), line.strip_prefix("! ")) {
                (Some(why), _) => step.why = Some(why.to_owned()),
                (None, Some(ours)) => step.ours.push(ours.to_owned()),
                (None, None) => step.redis.push(line.to_owned()),
            }
        }
    }
    cases
}

/// A command's words, as redis-cli takes them apart.
fn words(line: &str) -> Vec<Vec<u8>> {
    let bytes = line.as_bytes();
    let (mut words, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        if bytes[at] == b' ' {
            at += 1;
            continue;
        }
        let quote = Some(bytes[at]).filter(|byte| matches!(byte, b'"' | b'\''));
        at += usize::from(quote.is_some());
        let mut word = Vec::new();
        while let Some(&byte) = bytes.get(at) {
            at += 1;
            match (byte, quote, bytes.get(at)) {
                (b' ', None, _) => break,
                (byte, Some(quote), _) if byte == quote => break,
                (b'\\', Some(b'"'), Some(b'x')) => {
                    word.push(u8::from_str_radix(&line[at + 1..at + 3], 16).unwrap());
                    at += 3;
                }
                (b'\\', Some(b'"'), Some(&escaped)) => {
                    at += 1;
                    word.push(match escaped {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'a' => 7,
                        b'b' => 8,
                        other => other,
                    });
                }
                (byte, _, _) => word.push(byte),
            }
        }
        words.push(word);
    }
    words
}

struct Connection(BufReader<TcpStream>);

impl Connection {
    fn new(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(BufReader::new(stream))
    }

    /// The answer, as `redis-cli --no-raw` shows it.
    fn ask(&mut self, words: &[Vec<u8>]) -> std::io::Result<Vec<String>> {
        let mut sent = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            sent.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            sent.extend_from_slice(word);
            sent.extend_from_slice(b"\r\n");
        }
        self.0.get_mut().write_all(&sent)?;
        self.answer()
    }

    fn answer(&mut self) -> std::io::Result<Vec<String>> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let (kind, rest) = line.trim_end().split_at(1);
        let lines = match kind {
            "+" => vec![rest.to_owned()],
            "-" => vec![format!("(error) {rest}")],
            ":" => vec![format!("(integer) {rest}")],
            _ if rest == "-1" || kind == "_" => vec!["(nil)".to_owned()],
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().unwrap() + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                vec![quoted(&bytes)]
            }
            "*" if rest == "0" => vec!["(empty array)".to_owned()],
            "*" => {
                let (count, mut lines) = (rest.parse::<usize>().unwrap(), Vec::new());
                let width = rest.len();
                for number in 1..=count {
                    let head = format!("{number:width$}) ");
                    for (i, line) in self.answer()?.into_iter().enumerate() {
                        lines.push(if i == 0 { head.clone() } else { " ".repeat(head.len()) } + &line);
                    }
                }
                lines
            }
            other => panic!("{other}{rest} is no kind of answer that these cases have"),
        };
        Ok(lines)
    }
}

fn quoted(bytes: &[u8]) -> String {
    let mut text = String::from("\"");
    for byte in bytes {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(*byte)]),
            b'\n' => text.push_str("\\n"),
            b'\r' => text.push_str("\\r"),
            b'\t' => text.push_str("\\t"),
            7 => text.push_str("\\a"),
            8 => text.push_str("\\b"),
            32..=126 => text.push(char::from(*byte)),
            other => text.push_str(&format!("\\x{other:02x}")),
        }
    }
    text + "\""
}

fn fits(wanted: &[String], got: &[String]) -> bool {
    wanted.len() == got.len() && wanted.iter().zip(got).all(|(wanted, got)| fits_line(wanted, got))
}

/// `(integer) a..b` is any number from a to b; `*` in an error anything.
fn fits_line(wanted: &str, got: &str) -> bool {
    if let Some((head, (least, most))) =
        wanted.split_once("(integer) ").and_then(|(h, r)| Some((h, r.split_once("..")?)))
    {
        let number = got.strip_prefix(head).and_then(|rest| rest.strip_prefix("(integer) ")?.parse::<i64>().ok());
        return number.is_some_and(|n| (least.parse().unwrap()..=most.parse().unwrap()).contains(&n));
    }
    if !wanted.contains("(error)") {
        return wanted == got;
    }
    let mut parts = wanted.split('*');
    let Some(mut rest) = got.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut last = None;
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
        last = Some(part);
    }
    rest.is_empty() || last == Some("")
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_answer_as_redis_does_or_as_is_told_why_not() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("gateway/cases.txt");
    let cases = read(&std::fs::read_to_string(&file).unwrap());
    let cluster = Cluster::start(1, KEYSPACE);
    cluster.settled("gateway", 1, 1, 60).await;
    let gateway = Gateway::start(&cluster.operator_address(), &cluster.path().join("gateway.log"));
    let (mut commands, mut same, mut wrong) = (0, 0, Vec::new());
    for (name, steps) in &cases {
        // Whatever may be a key of this case holds nothing.
        let mut keys: Vec<Vec<u8>> = steps.iter().flat_map(|step| words(&step.command).into_iter().skip(1)).collect();
        keys.retain(|key| !key.is_empty() && key.len() < 1000);
        keys.insert(0, b"DEL".to_vec());
        if keys.len() > 1 {
            Connection::new(&gateway.redis).ask(&keys).unwrap();
        }
        let mut connection = Connection::new(&gateway.redis);
        for step in steps {
            if step.command.is_empty() {
                std::thread::sleep(step.wait);
                continue;
            }
            assert_eq!(step.ours.is_empty(), step.why.is_none(), "line {}: a difference has a reason", step.line);
            let got = connection.ask(&words(&step.command)).unwrap_or_else(|error| vec![format!("{error}")]);
            let like_redis = fits(&step.redis, &got);
            commands += 1;
            same += usize::from(like_redis);
            let wanted = if step.ours.is_empty() { &step.redis } else { &step.ours };
            if !fits(wanted, &got) {
                wrong.push(format!("line {}, {name}: {}: {got:?}, not {wanted:?}", step.line, step.command));
            } else if like_redis && !step.ours.is_empty() {
                wrong.push(format!(
                    "line {}, {name}: {}: it answers as Redis does: drop the mark",
                    step.line, step.command
                ));
            }
        }
    }
    println!("{} cases, {commands} commands, {same} answered as Redis does", cases.len());
    assert!(wrong.is_empty(), "{} of {commands} commands:\n{}", wrong.len(), wrong.join("\n"));
    assert!(commands > 5_000 && same > 4_500, "{commands} commands, {same} as Redis");
}
