// Tests a gateway's Redis side with ioredis, over versions 2 and 3 of the protocol: node ioredis.mjs HOST:PORT
// Checks once, prints `ready`, writes until standard input ends, then reads all of it back.

import { isDeepStrictEqual } from "node:util";
import { setTimeout as pause } from "node:timers/promises";
import Redis from "ioredis";

const [, HOST, PORT] = process.argv[2].match(/^(.*):(\d+)$/);
const KEYS = 500;
const PUTS = 16;
const PATIENCE = 10_000;
// Of this run alone, since nothing is cleaned up.
const PREFIX = `ioredis:${Date.now().toString(16)}-${process.pid}:`;

function stop(...words) {
  console.log(...words);
  process.exit(1);
}

function connect(options) {
  const redis = new Redis({ host: HOST, port: Number(PORT), ...options });
  redis.on("error", (error) => stop("connection:", error));
  return redis;
}

function show(value) {
  const text = Buffer.isBuffer(value) ? value.toString("latin1") : value;
  return (JSON.stringify(text) ?? String(text)).slice(0, 300);
}

function fail(what, got, wanted) {
  stop(`${what}: got ${show(got)}, wanted ${show(wanted)}`);
}

async function same(what, asked, wanted) {
  const got = await asked;
  if (!isDeepStrictEqual(got, wanted)) fail(what, got, wanted);
}

// A read may be older than the newest write for a moment.
async function becomes(what, read, wanted) {
  const deadline = Date.now() + PATIENCE;
  for (;;) {
    const got = await read();
    if (isDeepStrictEqual(got, wanted)) return;
    if (Date.now() > deadline) fail(what, got, wanted);
  }
}

async function between(what, asked, least, most) {
  const got = await asked;
  if (!Number.isInteger(got) || got < least || got > most) fail(what, got, `${least} to ${most}`);
}

async function refused(what, words, asked) {
  let got;
  try {
    got = await asked;
  } catch (error) {
    if (error.name !== "ReplyError" || !error.message.toLowerCase().includes(words)) {
      fail(what, `${error.name}: ${error.message}`, `a ReplyError with '${words}'`);
    }
    return;
  }
  fail(what, got, "a ReplyError");
}

async function scanned(redis, options) {
  const keys = [];
  for await (const some of redis.scanStream(options)) keys.push(...some);
  return keys.sort();
}

async function checks(protocol) {
  const redis = connect({ protocol });
  const k = (name) => `${PREFIX}v${protocol}:${name}`;
  const all = Buffer.from(Array.from({ length: 256 }, (_, i) => i));

  for (const [name, value] of [
    ["text", Buffer.from("grüße, 世界")],
    ["empty", Buffer.alloc(0)],
    ["bytes", all],
    ["lines", Buffer.from("\r\n$5\r\n+OK\r\n")],
    ["number", Buffer.from("-12.5")],
    ["like a number", Buffer.from("007")],
    ["big", Buffer.alloc(7 << 20, all)],
  ]) {
    await same(`set ${name}`, redis.set(k(name), value), "OK");
    await becomes(`get ${name}`, () => redis.getBuffer(k(name)), value);
    await becomes(`strlen ${name}`, () => redis.strlen(k(name)), value.length);
  }
  await becomes("get as text", () => redis.get(k("text")), "grüße, 世界");
  const key = Buffer.concat([Buffer.from(k("")), all]);
  await same("set with a binary key", redis.set(key, "x"), "OK");
  await becomes("get with a binary key", () => redis.get(key), "x");
  await same("get of nothing", redis.get(k("nothing")), null);

  await same("set EX", redis.set(k("ex"), "x", "EX", 100), "OK");
  await becomes("exists after EX", () => redis.exists(k("ex")), 1);
  await between("ttl after EX", redis.ttl(k("ex")), 90, 100);
  await between("pttl after EX", redis.pttl(k("ex")), 90_000, 100_000);
  await same("persist", redis.persist(k("ex")), 1);
  await becomes("ttl after persist", () => redis.ttl(k("ex")), -1);
  await same("persist again", redis.persist(k("ex")), 0);
  await same("pexpire", redis.pexpire(k("ex"), 50_000), 1);
  await becomes("ttl after pexpire", async () => (await redis.ttl(k("ex"))) > 40, true);
  await same("set KEEPTTL", redis.set(k("ex"), "y", "KEEPTTL"), "OK");
  await becomes("value after KEEPTTL", () => redis.get(k("ex")), "y");
  await between("ttl after KEEPTTL", redis.ttl(k("ex")), 40, 50);
  await same("getex", redis.getex(k("ex"), "EX", 200), "y");
  await becomes("ttl after getex", async () => (await redis.ttl(k("ex"))) > 190, true);
  await same("set PX", redis.set(k("px"), "x", "PX", 300), "OK");
  await becomes("a key ends", () => redis.get(k("px")), null);
  await becomes("ttl of nothing", () => redis.ttl(k("px")), -2);
  await same("setex", redis.setex(k("setex"), 100, "x"), "OK");
  await same("expire of nothing", redis.expire(k("nothing"), 5), 0);

  const many = Array.from({ length: 20 }, (_, i) => [k(`m${i}`), `v${i}`]);
  await same("mset", redis.mset(Object.fromEntries(many)), "OK");
  const values = [...many.map(([, value]) => value), null];
  await becomes("mget", () => redis.mget(...many.map(([key]) => key), k("nothing")), values);

  await same("incr", redis.incr(k("n")), 1);
  await same("incrby", redis.incrby(k("n"), 41), 42);
  await same("decr", redis.decr(k("n")), 41);
  await same("decrby", redis.decrby(k("n"), 50), -9);
  await same("incrbyfloat", redis.incrbyfloat(k("n"), 0.5), "-8.5");
  await same("set of a number", redis.set(k("n"), 10), "OK");
  await same("incr after set", redis.incr(k("n")), 11);

  await same("append to nothing", redis.append(k("a"), "abc"), 3);
  await same("append", redis.append(k("a"), Buffer.from([255, 0])), 5);
  await becomes("get after append", () => redis.getBuffer(k("a")), Buffer.from("abc\xff\0", "latin1"));
  await becomes("strlen", () => redis.strlen(k("a")), 5);
  await same("getrange", redis.getrange(k("a"), 1, -3), "bc");

  await same("set GET of nothing", redis.set(k("s"), "one", "GET"), null);
  await same("set GET", redis.set(k("s"), "two", "GET"), "one");
  await same("getset", redis.getset(k("s"), "three"), "two");
  await same("exists", redis.exists(k("s"), k("a"), k("nothing")), 2);
  await same("type", redis.type(k("s")), "string");
  await same("getdel", redis.getdel(k("s")), "three");
  await becomes("exists after getdel", () => redis.exists(k("s")), 0);
  await same("getdel of nothing", redis.getdel(k("s")), null);
  await same("del", redis.del(k("a"), k("n"), k("nothing")), 2);
  await becomes("mget after del", () => redis.mget(k("a"), k("n")), [null, null]);
  await same("unlink of nothing", redis.unlink(k("a")), 0);

  const numbers = Array.from({ length: 500 }, (_, i) => i);
  await same("mset of 500", redis.mset(...numbers.flatMap((i) => [k(`scan:${i}`), i])), "OK");
  const wanted = numbers.map((i) => k(`scan:${i}`)).sort();
  await becomes("scanStream", () => scanned(redis, { match: k("scan:*") }), wanted);
  await becomes("scanStream with count", () => scanned(redis, { match: k("scan:*"), count: 77 }), wanted);
  const some = wanted.filter((key) => /:\d+[34]$/.test(key));
  await same("scanStream of some", scanned(redis, { match: k("scan:*?[34]"), count: 1000 }), some);

  const pipeline = redis.pipeline();
  const answers = [];
  for (let i = 0; i < 40; i++) {
    pipeline.set(k(`p${i}`), `v${i}`).get(k(`p${i}`)).incr(k("pn")).append(k(`p${i}`), "xyz").exists(k("nothing"));
    answers.push("OK", `v${i}`, i + 1, `v${i}xyz`.length, 0);
  }
  await same("a pipeline of 200", pipeline.exec(), answers.map((answer) => [null, answer]));
  const errors = await redis.pipeline().set(k("text"), "text").incr(k("text")).get(k("text")).exec();
  const kinds = errors.map(([error, got]) => error?.name ?? got);
  await same("a pipeline with an error", kinds, ["OK", "ReplyError", "text"]);

  await refused("incr on text", "not an integer", redis.incr(k("text")));
  await refused("incrbyfloat on text", "not a valid float", redis.incrbyfloat(k("text"), 1.5));
  await refused("append to a number", "", redis.append(k("pn"), "x"));
  await refused("setnx", "not served", redis.setnx(k("text"), "x"));
  await refused("set NX", "not served", redis.set(k("text"), "x", "NX"));
  await refused("an unknown command", "unknown command", redis.call("FROBNICATE", "x"));
  await refused("lpush", "unknown command", redis.lpush(k("list"), "x"));
  await refused("get without a key", "wrong number of arguments", redis.call("GET"));
  await refused("a transaction", "execabort", redis.multi().set(k("text"), "other").exec());
  await same("multi", redis.multi({ pipeline: false }), "OK");
  await refused("a command of a transaction", "not served", redis.set(k("text"), "other"));
  await same("discard", redis.discard(), "OK");
  await refused("select of what is not there", "", redis.select("nowhere"));
  await refused("an empty key", "", redis.set("", "x"));
  await becomes("as before", () => redis.get(k("text")), "text");

  await same("client setname", redis.client("SETNAME", "ioredis"), "OK");
  await same("client getname", redis.client("GETNAME"), "ioredis");
  await same("ping", redis.ping(), "PONG");
  await same("echo", redis.echo("x"), "x");

  redis.stream.destroy();
  await same("get after the connection broke", redis.get(k("text")), "text");
  redis.disconnect(true);
  await same("get after disconnecting", redis.get(k("text")), "text");
  await same("quit", redis.quit(), "OK");

  const selected = connect({ protocol });
  await same("select by name", selected.select("gateway"), "OK");
  await becomes("get after select", () => selected.get(k("text")), "text");
  selected.disconnect();
}

async function main() {
  await checks(2);
  await checks(3);

  let ended = false;
  process.stdin.on("end", () => (ended = true)).resume();
  console.log("ready");

  // Nothing is tried again behind our back: each error shows, and each increment is sent once.
  const strict = { maxRetriesPerRequest: 0, autoResendUnfulfilledCommands: false };
  const clients = [2, 3].map((protocol) => connect({ protocol, ...strict }));
  for (const redis of clients) {
    redis.on("close", () => stop("a connection was closed"));
  }
  const key = (i) => `${PREFIX}k${i}`;
  const counter = PREFIX + "counter";
  const last = new Map();
  const written = new Set();
  let rounds = 0;
  let increments = 0;
  while (!ended) {
    const redis = clients[rounds % 2];
    const ids = Array.from({ length: PUTS }, (_, j) => (rounds * PUTS + j) % KEYS);
    const puts = redis.pipeline();
    for (const i of ids) {
      const value = `${i} in round ${rounds}`;
      written.add(`${i}=${value}`);
      puts.set(key(i), value);
    }
    for (const [error, got] of await puts.exec()) {
      if (error) throw error;
      await same("set", got, "OK");
    }
    ids.forEach((i) => last.set(i, `${i} in round ${rounds}`));
    const got = await redis.mget(...ids.map(key));
    ids.forEach((i, at) => {
      if (got[at] !== null && !written.has(`${i}=${got[at]}`)) {
        fail(`get ${key(i)}`, got[at], "something that was written to it");
      }
    });
    await redis.incr(counter);
    increments += 1;
    rounds += 1;
    await pause(5);
  }

  const deadline = Date.now() + PATIENCE;
  for (;;) {
    const wrong = [];
    for (const [i, wanted] of last) {
      const got = await clients[1].get(key(i));
      if (got !== wanted) wrong.push([key(i), got, wanted]);
    }
    const count = Number(await clients[1].get(counter));
    if (count !== increments) wrong.push([counter, count, increments]);
    if (wrong.length === 0) break;
    if (Date.now() > deadline) {
      for (const [what, got, wanted] of wrong) console.log(`${what}: got ${show(got)}, wanted ${show(wanted)}`);
      process.exit(1);
    }
  }
  console.log(`${rounds} rounds, all as written`);
  process.exit(0);
}

main().catch((error) => stop(error));
