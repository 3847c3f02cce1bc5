# Tests a gateway's Redis side with redis-py, over versions 2 and 3 of the protocol: python redis_py.py HOST:PORT
# Checks once, prints `ready`, writes until standard input ends, then reads all of it back.

import sys, threading, time

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

HOST, PORT = sys.argv[1].rsplit(":", 1)
KEYS = 500
PUTS = 16
PATIENCE = 10
# Of this run alone, since nothing is cleaned up.
PREFIX = f"redis_py:{time.time_ns():x}:"


def connect(protocol, **options):
    return redis.Redis(host=HOST, port=int(PORT), protocol=protocol, socket_timeout=30, **options)


def fail(what, got, wanted):
    print(f"{what}: got {got!r:.300}, wanted {wanted!r:.300}")
    sys.exit(1)


def same(what, got, wanted):
    if got != wanted or type(got) is not type(wanted):
        fail(what, got, wanted)


def becomes(what, read, wanted):
    """A read may be older than the newest write for a moment."""
    deadline = time.monotonic() + PATIENCE
    while (got := read()) != wanted:
        if time.monotonic() > deadline:
            fail(what, got, wanted)


def between(what, got, least, most):
    if type(got) is not int or not least <= got <= most:
        fail(what, got, f"{least} to {most}")


def refused(what, words, call, *args):
    try:
        got = call(*args)
    except redis.ResponseError as error:
        if words.lower() not in str(error).lower():
            fail(what, str(error), f"words with {words!r}")
    else:
        fail(what, got, "a ResponseError")


def checks(protocol):
    r, at = connect(protocol), f"v{protocol}:"
    k = lambda name: PREFIX + at + name

    for name, value in [
        ("text", "grüße, 世界".encode()),
        ("empty", b""),
        ("bytes", bytes(range(256))),
        ("lines", b"\r\n$5\r\n+OK\r\n"),
        ("number", b"-12.5"),
        ("like a number", b"007"),
        ("big", bytes(range(256)) * (7 * 4096)),
    ]:
        same(f"set {name}", r.set(k(name), value), True)
        becomes(f"get {name}", lambda: r.get(k(name)), value)
        becomes(f"strlen {name}", lambda: r.strlen(k(name)), len(value))
    key = PREFIX.encode() + at.encode() + bytes(range(256))
    same("set with a binary key", r.set(key, "x"), True)
    becomes("get with a binary key", lambda: r.get(key), b"x")
    same("get of nothing", r.get(k("nothing")), None)

    same("set EX", r.set(k("ex"), "x", ex=100), True)
    becomes("ttl after EX", lambda: 98 <= r.ttl(k("ex")) <= 100, True)
    between("pttl after EX", r.pttl(k("ex")), 90_000, 100_000)
    same("persist", r.persist(k("ex")), True)
    becomes("ttl after persist", lambda: r.ttl(k("ex")), -1)
    same("persist again", r.persist(k("ex")), False)
    same("expire", r.expire(k("ex"), 50), True)
    becomes("ttl after expire", lambda: 48 <= r.ttl(k("ex")) <= 50, True)
    same("set KEEPTTL", r.set(k("ex"), "y", keepttl=True), True)
    becomes("value after KEEPTTL", lambda: r.get(k("ex")), b"y")
    between("ttl after KEEPTTL", r.ttl(k("ex")), 40, 50)
    same("set PX", r.set(k("px"), "x", px=300), True)
    becomes("a key ends", lambda: r.get(k("px")), None)
    becomes("ttl of nothing", lambda: r.ttl(k("px")), -2)
    same("setex", r.execute_command("SETEX", k("setex"), 100, "x"), True)
    between("ttl after setex", r.ttl(k("setex")), 90, 100)
    same("psetex", r.psetex(k("psetex"), 100_000, "x"), True)
    between("pttl after psetex", r.pttl(k("psetex")), 90_000, 100_000)
    same("pexpire", r.pexpire(k("psetex"), 200_000), True)
    becomes("ttl after pexpire", lambda: 190 <= r.ttl(k("psetex")) <= 200, True)
    end = int(time.time()) + 1000
    same("expireat", r.expireat(k("psetex"), end), True)
    becomes("expiretime", lambda: r.expiretime(k("psetex")), end)
    same("pexpireat", r.pexpireat(k("psetex"), end * 1000 + 7), True)
    # The time is taken as one from now on, so that a few milliseconds come to it.
    between("pexpiretime", r.pexpiretime(k("psetex")), end * 1000 + 7, end * 1000 + 1000)
    same("getex PERSIST", r.getex(k("psetex"), persist=True), b"x")
    becomes("ttl after getex PERSIST", lambda: r.ttl(k("psetex")), -1)
    same("getex EX", r.getex(k("psetex"), ex=50), b"x")
    becomes("ttl after getex EX", lambda: 40 <= r.ttl(k("psetex")) <= 50, True)
    same("expire in the past", r.expire(k("psetex"), -1), True)
    becomes("a key that ended at once", lambda: r.get(k("psetex")), None)
    same("expire of nothing", r.expire(k("nothing"), 5), False)

    many = {k(f"m{i}"): f"v{i}".encode() for i in range(20)}
    same("mset", r.mset(many), True)
    becomes("mget", lambda: r.mget(list(many) + [k("nothing")]), list(many.values()) + [None])

    same("incr", r.incr(k("n")), 1)
    same("incrby", r.incrby(k("n"), 41), 42)
    same("decr", r.decr(k("n")), 41)
    same("decrby", r.decrby(k("n"), 50), -9)
    same("incrbyfloat", float(r.incrbyfloat(k("n"), 0.5)), -8.5)
    becomes("get of the number", lambda: r.get(k("n")), b"-8.5")
    same("set of a number", r.set(k("n"), 10), True)
    same("incr after set", r.incr(k("n")), 11)

    same("append to nothing", r.append(k("a"), "abc"), 3)
    same("append", r.append(k("a"), b"\xff\0"), 5)
    becomes("get after append", lambda: r.get(k("a")), b"abc\xff\0")
    becomes("strlen", lambda: r.strlen(k("a")), 5)
    same("getrange", r.getrange(k("a"), -2, -1), b"\xff\0")
    same("substr", r.substr(k("a"), 0, 2), b"abc")

    same("set GET of nothing", r.set(k("s"), "one", get=True), None)
    same("set GET", r.set(k("s"), "two", get=True), b"one")
    same("getset", r.getset(k("s"), "three"), b"two")
    same("exists", r.exists(k("s"), k("a"), k("nothing")), 2)
    same("touch", r.touch(k("s"), k("nothing")), 1)
    same("type", r.type(k("s")), b"string")
    same("type of nothing", r.type(k("nothing")), b"none")
    same("getdel", r.getdel(k("s")), b"three")
    becomes("exists after getdel", lambda: r.exists(k("s")), 0)
    same("getdel of nothing", r.getdel(k("s")), None)
    same("delete", r.delete(k("a"), k("n"), k("nothing")), 2)
    becomes("get after delete", lambda: r.mget(k("a"), k("n")), [None, None])
    same("unlink of nothing", r.unlink(k("a")), 0)

    same("mset of 500", r.mset({k(f"scan:{i}"): i for i in range(500)}), True)
    wanted = sorted(k(f"scan:{i}").encode() for i in range(500))
    becomes("scan_iter", lambda: sorted(r.scan_iter(match=k("scan:*"))), wanted)
    becomes("scan_iter COUNT", lambda: sorted(r.scan_iter(match=k("scan:*"), count=77)), wanted)
    some = sorted(k(f"scan:{i}").encode() for i in range(500) if i % 10 in (3, 4) and i >= 10)
    same("scan_iter of some", sorted(r.scan_iter(match=k("scan:*?[34]"), count=1000)), some)

    pipe, wanted = r.pipeline(transaction=False), []
    for i in range(40):
        pipe.set(k(f"p{i}"), f"v{i}").get(k(f"p{i}")).incr(k("pn")).append(k(f"p{i}"), "xyz").exists(k("nothing"))
        wanted += [True, f"v{i}".encode(), i + 1, len(f"v{i}") + 3, 0]
    same("a pipeline of 200", pipe.execute(), wanted)
    pipe = r.pipeline(transaction=False)
    pipe.set(k("text"), "text").incr(k("text")).get(k("text"))
    got = pipe.execute(raise_on_error=False)
    same("a pipeline with an error", [got[0], isinstance(got[1], redis.ResponseError), got[2]], [True, True, b"text"])

    refused("incr on text", "not an integer", r.incr, k("text"))
    refused("incrbyfloat on text", "not a valid float", r.incrbyfloat, k("text"), 1.5)
    refused("append to a number", "", r.append, k("pn"), "x")
    refused("setnx", "not served", r.setnx, k("text"), "x")
    refused("set NX", "not served", lambda: r.set(k("text"), "x", nx=True))
    refused("an unknown command", "unknown command", r.execute_command, "FROBNICATE", "x")
    refused("keys", "use SCAN", r.keys, "*")
    refused("lpush", "unknown command", r.lpush, k("list"), "x")
    refused("get without a key", "wrong number of arguments", r.execute_command, "GET")
    refused("a transaction", "not served", r.pipeline().set(k("transaction"), "x").execute)
    refused("select of what is not there", "", r.execute_command, "SELECT", "nowhere")
    refused("an empty key", "", r.set, "", "x")
    becomes("as before", lambda: r.get(k("text")), b"text")

    with r.client() as one:
        same("client setname", one.client_setname("redis_py"), True)
        got = one.client_getname()
        same("client getname", got.encode() if isinstance(got, str) else got, b"redis_py")
        same("client info", one.client_info()["name"], "redis_py")
        same("select by name", one.execute_command("SELECT", "gateway"), True)
        becomes("get after select", lambda: one.get(k("text")), b"text")
        refused("select of what is not there", "", one.execute_command, "SELECT", 7)
        same("get after a select that failed", one.get(k("text")), b"text")
        between("client id", one.client_id(), 1, 1 << 62)
        between("client list", len(one.client_list()), 1, 1 << 62)
        same("reset", one.execute_command("RESET") in (True, "RESET", b"RESET"), True)
        # It goes back to version 2.
        same("hello", b"proto" in one.execute_command("HELLO", protocol), True)
        same("client getname after reset", one.client_getname(), None)
        refused("hello of no version", "NOPROTO", one.execute_command, "HELLO", 9)
        refused("a password", "without any password", one.execute_command, "AUTH", "secret")
    same("ping", r.ping(), True)
    between("time", r.time()[0], int(time.time()) - 100, int(time.time()) + 100)
    between("dbsize", r.dbsize(), 500, 1 << 62)
    same("config get", r.config_get("max*")["maxmemory"] in ("0", b"0"), True)
    between("command count", r.command_count(), 40, 100)
    same("command", r.command()["mget"]["arity"], -2)
    same("command list", "mget" in [name if isinstance(name, str) else name.decode() for name in r.command_list()], True)
    same("echo", r.echo("x"), b"x")
    same("info", r.info()["redis_mode"], "standalone")

    r.connection_pool.disconnect()
    same("get after disconnecting", r.get(k("text")), b"text")
    same("quit", r.execute_command("QUIT") in (True, b"OK"), True)
    same("get after quit", r.get(k("text")), b"text")
    r.close()


def main():
    for protocol in (2, 3):
        checks(protocol)

    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), ended.set()), daemon=True).start()
    print("ready", flush=True)

    # Nothing is tried again behind our back: each error shows, and each increment is sent once.
    clients = [connect(protocol, retry=Retry(NoBackoff(), 0)) for protocol in (2, 3)]
    key = lambda i: f"{PREFIX}k{i}"
    counter = PREFIX + "counter"
    last, written, rounds, increments = {}, set(), 0, 0
    while not ended.is_set():
        r = clients[rounds % 2]
        ids = [(rounds * PUTS + j) % KEYS for j in range(PUTS)]
        values = {i: f"{i} in round {rounds}".encode() for i in ids}
        written.update((i, value) for i, value in values.items())
        pipe = r.pipeline(transaction=False)
        for i in ids:
            pipe.set(key(i), values[i])
        for got in pipe.execute():
            same("set", got, True)
        last.update(values)
        for i, got in zip(ids, r.mget([key(i) for i in ids])):
            if got is not None and (i, got) not in written:
                fail(f"get {key(i)}", got, "something that was written to it")
        r.incr(counter)
        increments += 1
        rounds += 1
        time.sleep(0.005)

    r = clients[0]
    deadline = time.monotonic() + PATIENCE
    while True:
        wrong = []
        for i, got in zip(last, r.mget([key(i) for i in last]) if last else []):
            if got != last[i]:
                wrong.append((key(i), got, last[i]))
        count = int(r.get(counter) or 0)
        if count != increments:
            wrong.append((counter, count, increments))
        if not wrong:
            break
        if time.monotonic() > deadline:
            for difference in wrong:
                print("%s: got %r, wanted %r" % difference)
            sys.exit(1)
    print(f"{rounds} rounds, all as written")


try:
    main()
except redis.RedisError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)
