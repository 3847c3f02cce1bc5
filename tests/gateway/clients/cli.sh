#!/usr/bin/env bash
# Tests a gateway's Redis side with redis-cli and redis-benchmark: bash cli.sh HOST:PORT
# Checks once, prints `ready`, writes until standard input ends, then reads all of it back.

set -u
host=${1%:*} port=${1##*:}
keys=300
patience=10
# Of this run alone, since nothing is cleaned up.
prefix=cli_sh:$(date +%s%N):
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

stop() {
    printf '%s\n' "$*"
    exit 1
}

# Errors make it fail, and it sends what it is told and nothing else: its input may be the one that says when to end.
cli() { redis-cli -h "$host" -p "$port" --no-raw -e "$@" </dev/null 2>&1; }

same() { [ "$2" = "$3" ] || stop "$1: got ${2:0:300}, wanted ${3:0:300}"; }

# says ANSWER COMMAND
says() { same "${*:2}" "$(cli "${@:2}")" "$1"; }

# becomes ANSWER COMMAND: a read may be older than the newest write for a moment
becomes() {
    local deadline=$((SECONDS + patience)) got
    while got=$(cli "${@:2}"); [ "$got" != "$1" ]; do
        [ $SECONDS -gt $deadline ] && same "${*:2}" "$got" "$1"
    done
}

# between LEAST MOST COMMAND
between() {
    local got
    got=$(cli "${@:3}")
    got=${got#(integer) }
    [[ $got =~ ^-?[0-9]+$ ]] && [ "$got" -ge "$1" ] && [ "$got" -le "$2" ] || stop "${*:3}: got $got, wanted $1 to $2"
}

# refused WORDS COMMAND
refused() {
    local got
    got=$(cli "${@:2}") && stop "${*:2}: got $got, wanted an error"
    [[ $got == *"$1"* ]] || stop "${*:2}: got $got, wanted an error with '$1'"
}

# benchmark REQUESTS: it ends at the first error
benchmark() {
    redis-benchmark -h "$host" -p "$port" -q -P 16 -n "$1" -r 1000 -t set,get,incr,mset </dev/null >"$dir/bench" 2>&1 ||
        stop "redis-benchmark: $(tail -c 300 "$dir/bench")"
    grep -iE 'error|warning' "$dir/bench" && exit 1
    same "tests of redis-benchmark" "$(tr '\r' '\n' <"$dir/bench" | grep -c 'requests per second')" 4
}

strings() {
    local k=$prefix
    says OK SET "${k}text" "grüße"
    becomes '"gr\xc3\xbc\xc3\x9fe"' GET "${k}text"
    says '(integer) 7' STRLEN "${k}text"
    says '"gr"' GETRANGE "${k}text" 0 1
    says '"e"' SUBSTR "${k}text" -1 -1
    says OK SET "${k}empty" ""
    becomes '""' GET "${k}empty"
    says '(nil)' GET "${k}nothing"
    says OK MSET "${k}m1" one "${k}m2" two
    becomes $'1) "one"\n2) "two"\n3) (nil)' MGET "${k}m1" "${k}m2" "${k}nothing"
    says '(integer) 3' APPEND "${k}a" abc
    says '(integer) 6' APPEND "${k}a" def
    becomes '"abcdef"' GET "${k}a"
    says '(nil)' SET "${k}s" one GET
    says '"one"' SET "${k}s" two GET
    says '"two"' GETSET "${k}s" three
    says '(integer) 2' EXISTS "${k}s" "${k}a" "${k}nothing"
    says '(integer) 1' TOUCH "${k}s"
    says string TYPE "${k}s"
    says none TYPE "${k}nothing"
    says '"three"' GETDEL "${k}s"
    says '(nil)' GETDEL "${k}s"
    says '(integer) 2' DEL "${k}m1" "${k}m2" "${k}nothing"
    becomes $'1) (nil)\n2) (nil)' MGET "${k}m1" "${k}m2"
    says '(integer) 1' UNLINK "${k}a"

    # Any bytes through standard input.
    for i in {0..255}; do printf "\\x$(printf %02x "$i")"; done >"$dir/bytes"
    same "SET with -x" "$(redis-cli -h "$host" -p "$port" -x SET "${k}bytes" <"$dir/bytes")" OK
    becomes '(integer) 256' STRLEN "${k}bytes"
    redis-cli -h "$host" -p "$port" --raw GET "${k}bytes" </dev/null | head -c 256 | cmp - "$dir/bytes" || exit 1
}

numbers() {
    local n=${prefix}n
    says '(integer) 1' INCR "$n"
    says '(integer) 42' INCRBY "$n" 41
    says '(integer) 41' DECR "$n"
    says '(integer) -9' DECRBY "$n" 50
    says '"-8.5"' INCRBYFLOAT "$n" 0.5
    becomes '"-8.5"' GET "$n"
    says OK SET "$n" 10
    says '(integer) 11' INCR "$n"
}

expiry() {
    local e=${prefix}e at=$(($(date +%s) + 1000))
    says OK SET "$e" x EX 100
    between 90 100 TTL "$e"
    between 90000 100000 PTTL "$e"
    says OK SET "$e" y KEEPTTL
    between 90 100 TTL "$e"
    says '(integer) 1' PERSIST "$e"
    becomes '(integer) -1' TTL "$e"
    says '(integer) 0' PERSIST "$e"
    says '(integer) 1' EXPIRE "$e" 50
    between 40 50 TTL "$e"
    says '(integer) 1' PEXPIRE "$e" 70000
    between 60 70 TTL "$e"
    says '(integer) 1' EXPIREAT "$e" $at
    becomes "(integer) $at" EXPIRETIME "$e"
    # The time is taken as one from now on, so that a few milliseconds come to it.
    says '(integer) 1' PEXPIREAT "$e" $((at * 1000 + 5))
    between $((at * 1000 + 5)) $((at * 1000 + 1000)) PEXPIRETIME "$e"
    says '"y"' GETEX "$e" EX 30
    between 20 30 TTL "$e"
    says OK SETEX "$e" 100 z
    says OK PSETEX "$e" 300 z
    becomes '(nil)' GET "$e"
    says '(integer) -2' TTL "$e"
    says '(integer) 0' EXPIRE "$e" 5
}

connection() {
    says PONG PING
    says '"hi"' PING hi
    says '"hi"' ECHO hi
    says OK SELECT gateway
    says OK SELECT 0
    says '(nil)' CLIENT GETNAME
    says OK CLIENT SETNAME me
    between 1 1000000000 CLIENT ID
    says RESET RESET
    says OK QUIT
    between 1 1000000000 DBSIZE
    between 40 100 COMMAND COUNT
    says $'1) "maxmemory"\n2) "0"' CONFIG GET maxmemory
    [[ $(cli INFO server) == *redis_version:* ]] || stop "INFO server: $(cli INFO server)"
    [[ $(cli HELLO 3) == *'"proto" => (integer) 3'* ]] || stop "HELLO 3: $(cli HELLO 3)"
    [[ $(cli TIME) == '1) "'*'2) "'* ]] || stop "TIME: $(cli TIME)"
    [[ $(cli COMMAND DOCS get) == *"Reads a key."* ]] || stop "COMMAND DOCS get: $(cli COMMAND DOCS get)"
    # Both versions of the protocol, and the default keyspace by its number.
    says '"10"' -2 GET "${prefix}as"
    says '"10"' -3 GET "${prefix}as"
    says '"10"' -n 0 GET "${prefix}as"
}

errors() {
    local t=${prefix}text
    refused "not an integer" INCR "$t"
    refused "not an integer" INCRBY "${prefix}n" 1.5
    refused "not an integer" INCRBY "${prefix}n" 9007199254740993
    refused "not a valid float" INCRBYFLOAT "$t" 1
    refused WRONGTYPE APPEND "${prefix}n" x
    refused "syntax error" SET "$t" x EX
    refused "syntax error" SET "$t" x FOO
    refused "invalid expire time" SET "$t" x EX 0
    refused "invalid expire time" SETEX "$t" -1 x
    refused "not served" SET "$t" x NX
    refused "not served" SETNX "$t" x
    refused "without MULTI" EXEC
    refused "not served" WATCH "$t"
    refused "not served" EVAL "return 1" 0
    refused "use SCAN" KEYS '*'
    refused "operator" FLUSHALL
    refused "unknown command" LPUSH "$t" x
    refused "wrong number of arguments" GET
    refused "wrong number of arguments" MSET a b c
    refused "invalid cursor" SCAN x
    refused "invalid cursor" SCAN 7
    refused "does not exist" SELECT nowhere
    refused "key is empty" SET "" x
    refused "without any password" AUTH secret
    refused NOPROTO HELLO 9
    refused "can only GET" CONFIG SET maxmemory 1
    becomes '"gr\xc3\xbc\xc3\x9fe"' GET "$t"
}

many() {
    local wanted got deadline
    # Mass insertion: 5000 commands as they go over the wire.
    for i in {0..4999}; do
        key=${prefix}p$i
        printf '*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%d\r\n' ${#key} "$key" ${#i} "$i"
    done >"$dir/wire"
    got=$(redis-cli -h "$host" -p "$port" --pipe <"$dir/wire" 2>&1)
    [[ $got == *"errors: 0, replies: 5000"* ]] || stop "--pipe: $got"
    wanted=$(printf "\"${prefix}p%d\"\n" {0..4999} | sort)
    deadline=$((SECONDS + patience))
    while got=$(cli --scan --pattern "${prefix}p*" | sort); [ "$got" != "$wanted" ]; do
        [ $SECONDS -gt $deadline ] && same "--scan of 5000 keys" "$got" "$wanted"
    done
    same "--scan of some" "$(cli --scan --pattern "${prefix}p[12]?3" | wc -l)" 20
    becomes '"4999"' GET "${prefix}p4999"
    # As errors come, the others are carried out.
    got=$(printf "INCR ${prefix}text\r\nINCR ${prefix}pn\r\nINCR ${prefix}pn\r\n" |
        redis-cli -h "$host" -p "$port" --pipe 2>&1)
    [[ $got == *"errors: 1, replies: 3"* ]] || stop "--pipe with an error: $got"
    becomes '"2"' GET "${prefix}pn"
}

strings
numbers
expiry
cli SET "${prefix}as" 10 >"$dir/set"
becomes '"10"' GET "${prefix}as"
connection
errors
many
benchmark 20000
echo ready

# Standard input has ended; one that says nothing is waited for a little.
ended() {
    local code
    read -r -t 0.05 _
    code=$?
    [ $code -eq 1 ]
}

declare -a last
rounds=0 increments=0
until ended; do
    # What a store that has not heard of all increments answers may be less.
    between 1 $((increments + 1)) INCR "${prefix}counter"
    increments=$((increments + 1))
    pairs=()
    for j in {0..7}; do
        i=$(((rounds * 9 + j) % keys))
        last[i]="$i in round $rounds"
        pairs+=("${prefix}k$i" "${last[i]}")
    done
    says OK MSET "${pairs[@]}"
    i=$(((rounds * 9 + 8) % keys))
    last[i]="$i in round $rounds"
    says OK SET "${prefix}k$i" "${last[i]}"
    got=$(cli GET "${prefix}k$i")
    [[ $got == '(nil)' || $got == "\"$i in round "* ]] || stop "GET ${prefix}k$i: got $got, wanted what was written to it"
    [ $((rounds % 10)) -eq 0 ] && benchmark 2000
    rounds=$((rounds + 1))
done

deadline=$((SECONDS + patience))
all=()
for i in "${!last[@]}"; do all+=("${prefix}k$i"); done
wanted=$(printf '"%s"\n' "${last[@]}" "$increments")
while got=$(cli MGET "${all[@]}" "${prefix}counter" | sed 's/^ *[0-9]*) //'); [ "$got" != "$wanted" ]; do
    if [ $SECONDS -gt $deadline ]; then
        diff <(echo "$got") <(echo "$wanted")
        exit 1
    fi
done
echo "$rounds rounds, all as written"
