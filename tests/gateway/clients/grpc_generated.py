# Tests a gateway's gRPC side with stubs that were generated from kv.proto: python grpc_generated.py HOST:PORT STUBS
# Checks once, prints `ready`, writes until standard input ends, then reads all of it back.

import sys, threading, time

import grpc

sys.path.insert(0, sys.argv[2])
from vasto.v1 import kv_pb2 as pb, kv_pb2_grpc

KEYSPACE = "gateway"
KEYS = 200
PATIENCE = 10
# Of this run alone, since nothing is cleaned up.
PREFIX = f"grpc_generated:{time.time_ns():x}:".encode()
# It would try again behind our back.
kv = kv_pb2_grpc.KvStub(grpc.insecure_channel(sys.argv[1], options=[("grpc.enable_retries", 0)]))


def same(what, got, wanted):
    if got != wanted:
        print(f"{what}: got {got!r:.300}, wanted {wanted!r:.300}")
        sys.exit(1)


def becomes(what, read, wanted):
    """A read may be older than the newest write for a moment."""
    deadline = time.monotonic() + PATIENCE
    while (got := read()) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    same(what, got, wanted)


def get(key):
    value = kv.Get(pb.KvGetRequest(keyspace=KEYSPACE, key=key)).value
    return getattr(value, value.WhichOneof("data")) if value.WhichOneof("data") else None


def checks():
    key = PREFIX + b"\0\xff"
    kv.Put(pb.KvPutRequest(keyspace=KEYSPACE, key=key, bytes=b"\r\n\0"))
    becomes("get", lambda: get(key), b"\r\n\0")
    merged = kv.Merge(pb.KvMergeRequest(keyspace=KEYSPACE, key=PREFIX + b"n", add=2.5))
    same("merge", merged.number, 2.5)
    kv.Delete(pb.KvDeleteRequest(keyspace=KEYSPACE, key=key))
    becomes("get of what was deleted", lambda: get(key), None)
    puts = [pb.KvOperation(put=pb.KvPutRequest(key=PREFIX + b"s%d" % i, number=i)) for i in range(10)]
    results = kv.Batch(pb.KvBatchRequest(keyspace=KEYSPACE, operations=puts)).results
    same("a batch", [result.WhichOneof("result") for result in results], ["put"] * 10)
    pages = lambda: kv.Scan(pb.KvScanRequest(keyspace=KEYSPACE, prefix=PREFIX + b"s"))
    becomes("a scan", lambda: [e.value.number for page in pages() for e in page.entries], [float(i) for i in range(10)])
    try:
        kv.Get(pb.KvGetRequest(keyspace="nowhere", key=b"x"))
        same("a keyspace that is not there", "an answer", "NOT_FOUND")
    except grpc.RpcError as error:
        same("a keyspace that is not there", error.code(), grpc.StatusCode.NOT_FOUND)


def main():
    checks()
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), ended.set()), daemon=True).start()
    print("ready", flush=True)
    last, rounds = {}, 0
    while not ended.is_set():
        key, value = PREFIX + b"k%d" % (rounds % KEYS), b"%d" % rounds
        kv.Put(pb.KvPutRequest(keyspace=KEYSPACE, key=key, bytes=value))
        kv.Merge(pb.KvMergeRequest(keyspace=KEYSPACE, key=PREFIX + b"counter", add=1))
        last[key], rounds = value, rounds + 1
        time.sleep(0.005)
    for key, value in last.items():
        becomes(f"{key}", lambda: get(key), value)
    becomes("the counter", lambda: get(PREFIX + b"counter"), float(rounds) if rounds else None)
    print(f"{rounds} rounds, all as written")


try:
    main()
except grpc.RpcError as error:
    print(f"{error.code()}: {error.details()}")
    sys.exit(1)
