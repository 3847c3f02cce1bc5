# Tests a gateway's gRPC side with grpcio, by what server reflection tells of it: python grpc_py.py HOST:PORT
# Checks once, prints `ready`, writes until standard input ends, then reads all of it back.

import sys, threading, time

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "vasto.v1.Kv"
KEYSPACE = "gateway"
KEYS = 500
PUTS = 16
PATIENCE = 10
# Of this run alone, since nothing is cleaned up.
PREFIX = f"grpc_py:{time.time_ns():x}:".encode()

# By itself grpcio takes only 4 MiB, and a value may have 8; and it would try again behind our back.
channel = grpc.insecure_channel(
    sys.argv[1], options=[("grpc.max_receive_message_length", 16 << 20), ("grpc.enable_retries", 0)]
)


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


def refused(what, code, words, call, *args, **fields):
    try:
        got = call(*args, **fields)
    except grpc.RpcError as error:
        if error.code() != code or words not in error.details():
            fail(what, f"{error.code()}: {error.details()}", f"{code} with {words!r}")
    else:
        fail(what, got, code)


class Kv:
    """Each method of the service as a function of its request's fields; a stream comes as a list, if it is wanted whole."""

    def __init__(self):
        self.reflection = ProtoReflectionDescriptorDatabase(channel)
        self.service = DescriptorPool(self.reflection).FindServiceByName(SERVICE)
        for method in self.service.methods:
            setattr(self, method.name, self.method(method))

    def method(self, method):
        ask, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        kind = channel.unary_stream if method.server_streaming else channel.unary_unary
        send = kind(f"/{SERVICE}/{method.name}", ask.SerializeToString, answer.FromString)

        def call(keyspace=KEYSPACE, whole=True, **fields):
            got = send(ask(keyspace=keyspace, **fields), timeout=30)
            return list(got) if method.server_streaming and whole else got

        return call

    def read(self, key, **fields):
        """What the key holds: bytes, a float, or None."""
        return plain(self.Get(key=key, **fields))

    def scan(self, **fields):
        pages = self.Scan(**fields)
        if not all(page.entries for page in pages):
            fail("scan", "a page without entries", "none such")
        return [entry for page in pages for entry in page.entries]


def plain(got):
    kind = got.value.WhichOneof("data") if got.HasField("value") else None
    return getattr(got.value, kind) if kind else None


def checks(kv):
    k = lambda name: PREFIX + b"c:" + name
    INVALID, MISMATCH = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION

    listed = kv.reflection.get_services()
    same("services", {SERVICE, "grpc.health.v1.Health"} <= set(listed), True)
    methods = sorted(method.name for method in kv.service.methods)
    same("methods", methods, ["Batch", "Delete", "Get", "Merge", "Put", "Scan"])

    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        same(f"health of {name!r}", health.Check(health_pb2.HealthCheckRequest(service=name)).status, 1)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    same("health as a stream", next(watch).status, 1)
    watch.cancel()
    unknown = health_pb2.HealthCheckRequest(service="nothing")
    refused("health of nothing", grpc.StatusCode.NOT_FOUND, "", health.Check, unknown)

    for name, value in [
        (b"text", "grüße, 世界".encode()),
        (b"empty", b""),
        (bytes(range(256)), bytes(range(256))),
        (b"big", bytes(range(256)) * (8 * 4096)),
    ]:
        same("version", kv.Put(key=k(name), bytes=value).version != "", True)
        becomes(f"get {name!r}", lambda: kv.read(k(name)), value)
    for number in (0.0, -12.5, 1e300, 5e-324):
        kv.Put(key=k(b"number"), number=number)
        becomes(f"get {number}", lambda: kv.read(k(b"number")), number)
    same("get of nothing", kv.read(k(b"nothing")), None)
    version = kv.Put(key=k(b"version"), bytes=b"x").version
    becomes("the version", lambda: kv.Get(key=k(b"version")).value.version, version)
    same("another version", kv.Put(key=k(b"version"), bytes=b"x").version != version, True)

    kv.Put(key=k(b"ttl"), bytes=b"x", ttl_ms=100_000)
    end = lambda: kv.Get(key=k(b"ttl")).value.expiry_ms / 1000 - time.time()
    becomes("expiry", lambda: 90 < end() <= 101, True)
    kv.Put(key=k(b"ttl"), bytes=b"x", ttl_ms=300)
    becomes("a key ends", lambda: kv.read(k(b"ttl")), None)
    kv.Put(key=k(b"forever"), bytes=b"x")
    becomes("no expiry", lambda: kv.Get(key=k(b"forever")).value.expiry_ms, 0)

    key = k(b"n")
    for fields, wanted in [({"add": 5}, 5.0), ({"add": -1.5}, 3.5), ({"max": 9}, 9.0), ({"max": 1}, 9.0), ({"min": 2}, 2.0)]:
        same(f"merge {fields}", kv.Merge(key=key, **fields).number, wanted)
    becomes("get after merges", lambda: kv.read(key), 2.0)
    key = k(b"a")
    same("append", kv.Merge(key=key, append=b"abc").HasField("number"), False)
    kv.Merge(key=key, append=b"\xff\0")
    becomes("get after append", lambda: kv.read(key), b"abc\xff\0")

    kv.Delete(key=key)
    becomes("get after delete", lambda: kv.read(key), None)
    kv.Delete(key=key)

    # The shard is chosen by the partition key: without it the key is looked for elsewhere.
    kv.Put(key=k(b"part"), partition_key=b"one", bytes=b"x")
    becomes("get with a partition key", lambda: kv.read(k(b"part"), partition_key=b"one"), b"x")
    kv.Merge(key=k(b"part"), partition_key=b"one", append=b"y")
    becomes("append with a partition key", lambda: kv.read(k(b"part"), partition_key=b"one"), b"xy")
    kv.Delete(key=k(b"part"), partition_key=b"one")
    becomes("delete with a partition key", lambda: kv.read(k(b"part"), partition_key=b"one"), None)

    kv.Batch(operations=[{"put": {"key": k(b"scan:%03d" % i), "number": i}} for i in range(500)])
    keys = [k(b"scan:%03d" % i) for i in range(500)]
    listed = lambda **fields: [entry.key for entry in kv.scan(prefix=k(b"scan:"), **fields)]
    becomes("scan", listed, keys)
    same("values of a scan", [entry.value.number for entry in kv.scan(prefix=k(b"scan:"))], [float(i) for i in range(500)])
    same("scan after a key", listed(after=keys[99]), keys[100:])
    same("scan with a limit", listed(after=keys[99], limit=7), keys[100:107])
    same("scan of nothing", listed(after=keys[-1]), [])
    [entry] = kv.scan(prefix=k(b"text"), keys_only=True)
    same("scan of keys only", [entry.key, entry.value.bytes], [k(b"text"), b""])
    kv.Batch(operations=[{"put": {"key": k(b"long:%02d" % i), "bytes": b"x" * 100_000}} for i in range(50)])
    becomes("scan of 5 MB", lambda: [len(entry.value.bytes) for entry in kv.scan(prefix=k(b"long:"))], [100_000] * 50)
    same("messages of 5 MB", len(kv.Scan(prefix=k(b"long:"))) > 5, True)

    for _ in range(20):
        pages = kv.Scan(prefix=k(b"long:"), whole=False)
        same("the first message of a scan", next(pages).entries[0].key, k(b"long:00"))
        pages.cancel()

    operations = [
        {"get": {"key": k(b"text")}},
        {"put": {"key": k(b"b1"), "bytes": b"x", "ttl_ms": 50_000}},
        {"merge": {"key": k(b"b2"), "add": 2}},
        {"merge": {"key": k(b"b3"), "append": b"x"}},
        {"delete": {"key": k(b"b4")}},
        {"get": {"key": k(b"nothing")}},
        {"get": {"key": b""}},
        {"merge": {"key": k(b"text"), "add": 1}},
    ]
    results = kv.Batch(operations=operations).results
    kinds = [result.WhichOneof("result") for result in results]
    same("kinds of a batch", kinds, ["get", "put", "merge", "merge", "delete", "get", "error", "error"])
    same("get in a batch", plain(results[0].get), "grüße, 世界".encode())
    same("merge in a batch", results[2].merge.number, 2.0)
    same("get of nothing in a batch", plain(results[5].get), None)
    same("errors in a batch", [result.error.code for result in results[6:]], [INVALID.value[0], MISMATCH.value[0]])
    same("words in a batch", "the key is empty" in results[6].error.message, True)
    becomes("get after a batch", lambda: kv.read(k(b"b1")), b"x")
    same("an empty batch", len(kv.Batch().results), 0)

    for method, fields in [(kv.Get, {"key": b"x"}), (kv.Put, {"key": b"x", "number": 1}), (kv.Scan, {}), (kv.Batch, {})]:
        refused("no such keyspace", grpc.StatusCode.NOT_FOUND, "does not exist", method, keyspace="nowhere", **fields)
        refused("no name", INVALID, "no name of a keyspace", method, keyspace="no name", **fields)
    for method, fields in [(kv.Get, {}), (kv.Put, {"number": 1}), (kv.Delete, {}), (kv.Merge, {"add": 1})]:
        refused("an empty key", INVALID, "the key is empty", method, **fields)
        refused("a long key", INVALID, "over the limit", method, key=b"x" * 32_769, **fields)
    refused("an empty partition key", INVALID, "partition key is empty", kv.Get, key=b"x", partition_key=b"")
    refused("a put without data", INVALID, "has no data", kv.Put, key=k(b"x"))
    refused("a merge without operand", INVALID, "has no operand", kv.Merge, key=k(b"x"))
    refused("a batch of nothings", INVALID, "operations[1]", kv.Batch, operations=[{"get": {"key": b"x"}}, {}])
    refused("a long value", INVALID, "8388608", kv.Put, key=k(b"x"), bytes=b"x" * ((8 << 20) + 1))
    refused("a ttl beyond all time", INVALID, "ttl", kv.Put, key=k(b"x"), number=1, ttl_ms=(1 << 64) - 1)
    for number in (float("nan"), float("inf")):
        refused("no number", INVALID, "not a finite number", kv.Put, key=k(b"x"), number=number)
    refused("add to bytes", MISMATCH, "holds bytes", kv.Merge, key=k(b"text"), add=1)
    refused("append to a number", MISMATCH, "holds a number", kv.Merge, key=k(b"n"), append=b"x")
    refused("a value that grows too long", INVALID, "8388608", kv.Merge, key=k(b"big"), append=b"x")
    refused("no such method", grpc.StatusCode.UNIMPLEMENTED, "", channel.unary_unary(f"/{SERVICE}/Nothing"), b"")
    becomes("as before", lambda: kv.read(k(b"text")), "grüße, 世界".encode())


def main():
    kv = Kv()
    checks(kv)

    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), ended.set()), daemon=True).start()
    print("ready", flush=True)

    key = lambda i: PREFIX + b"k%d" % i
    read = lambda ids: [plain(result.get) for result in kv.Batch(operations=[{"get": {"key": key(i)}} for i in ids]).results]
    counter = PREFIX + b"counter"
    last, written, rounds, increments = {}, set(), 0, 0
    while not ended.is_set():
        ids = [(rounds * PUTS + j) % KEYS for j in range(PUTS)]
        values = {i: b"%d in round %d" % (i, rounds) for i in ids}
        written.update(values.items())
        puts = [{"put": {"key": key(i), "bytes": values[i]}} for i in ids]
        for result in kv.Batch(operations=puts).results:
            if result.WhichOneof("result") != "put":
                fail("put", result, "a version")
        last.update(values)
        for i, got in zip(ids, read(ids)):
            if got is not None and (i, got) not in written:
                fail(f"get {key(i)}", got, "something that was written to it")
        kv.Merge(key=counter, add=1)
        increments += 1
        rounds += 1
        time.sleep(0.005)

    deadline = time.monotonic() + PATIENCE
    while True:
        wrong = [(key(i), got, last[i]) for i, got in zip(last, read(last)) if got != last[i]]
        count = kv.read(counter) or 0
        if count != increments:
            wrong.append((counter, count, increments))
        if not wrong:
            break
        if time.monotonic() > deadline:
            for difference in wrong:
                print("%r: got %r, wanted %r" % difference)
            sys.exit(1)
    print(f"{rounds} rounds, all as written")


try:
    main()
except grpc.RpcError as error:
    print(f"{error.code()}: {error.details()}")
    sys.exit(1)
