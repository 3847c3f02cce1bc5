#!/usr/bin/env bash
# Tests a gateway's HTTP side with curl: bash http.sh HOST:PORT
# Checks once, prints `ready`, writes until standard input ends, then reads all of it back.

set -u
base=http://$1
map=$base/v1/gateway
keys=200
patience=10
# Of this run alone, since nothing is cleaned up.
prefix=http_sh:$(date +%s%N):
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

stop() {
    printf '%s\n' "$*"
    exit 1
}

# ask CURL'S ARGUMENTS: leaves the status in $status, the head in $dir/head, the body in $dir/body
ask() {
    status=$(curl -sS -m 30 -D "$dir/head" -o "$dir/body" -w '%{http_code}' "$@" 2>&1) || stop "curl ${*: -1}: $status"
}

body() { head -c 300 "$dir/body"; }

# wants WHAT STATUS CURL'S ARGUMENTS
wants() {
    ask "${@:3}"
    [ "$status" = "$2" ] || stop "$1: got $status $(body), wanted $2"
}

# answers WHAT BODY CURL'S ARGUMENTS: 200 with this body; a read may be older than the newest write for a moment
answers() {
    local deadline=$((SECONDS + patience))
    while ask "${@:3}"; [ "$status $(cat "$dir/body")" != "200 $2" ]; do
        [ $SECONDS -gt $deadline ] && stop "$1: got $status $(body), wanted 200 $2"
    done
}

# becomes WHAT STATUS CURL'S ARGUMENTS
becomes() {
    local deadline=$((SECONDS + patience))
    while ask "${@:3}"; [ "$status" != "$2" ]; do
        [ $SECONDS -gt $deadline ] && stop "$1: got $status $(body), wanted $2"
    done
}

# refused WHAT STATUS CODE WORDS CURL'S ARGUMENTS
refused() {
    wants "$1" "$2" "${@:5}"
    typed "$1" application/json
    jq -e --arg code "$3" --arg words "$4" '.error.code == $code and (.error.message | contains($words))' \
        "$dir/body" >"$dir/jq" 2>&1 || stop "$1: got $(body), wanted $3 with '$4'"
}

# header NAME: its value in the last answer
header() { sed -n "s/^$1: //Ip" "$dir/head" | tr -d '\r' | tail -1; }

# same WHAT GOT WANTED
same() { [ "$2" = "$3" ] || stop "$1: got ${2:0:300}, wanted ${3:0:300}"; }

typed() { same "$1: content type" "$(header content-type)" "$2"; }

# between WHAT GOT LEAST MOST
between() {
    [[ $2 =~ ^[0-9]+$ ]] && [ "$2" -ge "$3" ] && [ "$2" -le "$4" ] || stop "$1: got $2, wanted $3 to $4"
}

# stored WHAT FILE KEY: the key holds just these bytes
stored() {
    local deadline=$((SECONDS + patience))
    while ask "$map/$3"; [ "$status" != 200 ] || ! cmp -s "$2" "$dir/body"; do
        [ $SECONDS -gt $deadline ] && stop "$1: got $status and other bytes than were put"
    done
}

pages() {
    for path in / /v1 /healthz /livez /readyz; do
        wants "$path" 200 "$base$path"
        typed "$path" "text/plain; charset=utf-8"
    done
    wants "head of /healthz" 200 -I "$base/healthz"
    wants /metrics 200 "$base/metrics"
    typed /metrics "application/openmetrics-text; version=1.0.0; charset=utf-8"
    grep -q '^vasto_gateway_.*protocol="http"' "$dir/body" || stop "/metrics: nothing of http in it"
    same "/metrics: the end" "$(tail -1 "$dir/body")" "# EOF"
    wants /openapi.yaml 200 "$base/openapi.yaml"
    typed /openapi.yaml application/yaml
    same "/openapi.yaml: the beginning" "$(head -1 "$dir/body")" "openapi: 3.1.0"
    refused "no such path" 404 NO_SUCH_PATH "not served here" "$base/nothing"
    refused "post to a page" 405 METHOD_NOT_ALLOWED "use GET, HEAD" -X POST "$base/healthz"
    same "post to a page: allow" "$(header allow)" "GET, HEAD"
}

# All bytes there are, which bash can't hold.
every_byte() { for i in {0..255}; do printf "\\x$(printf %02x "$i")"; done; }

values() {
    local k=$prefix
    printf 'grüße, 世界' >"$dir/text"
    : >"$dir/empty"
    every_byte >"$dir/bytes"
    printf '007' >"$dir/number-like"
    head -c $((8 << 20)) /dev/urandom >"$dir/big"
    for name in text empty bytes number-like big; do
        wants "put $name" 204 -T "$dir/$name" "$map/$k$name"
        local tag=$(header etag)
        [ -n "$tag" ] || stop "put $name: no etag"
        stored "get $name" "$dir/$name" "$k$name"
        typed "get $name" application/octet-stream
        same "get $name: type" "$(header vasto-type)" bytes
        same "get $name: etag" "$(header etag)" "$tag"
        same "get $name: ttl" "$(header vasto-ttl-ms)" ""
        wants "head $name" 200 -I "$map/$k$name"
        same "head $name: length" "$(header content-length)" "$(stat -c %s "$dir/$name")"
    done
    wants "put of a body in chunks" 204 -T - "$map/${k}chunks" <"$dir/bytes"
    stored "get of a body in chunks" "$dir/bytes" "${k}chunks"

    local key=$k/a/b%2F%00%FF%3F%20%25
    wants "put with a binary key" 204 -T "$dir/text" "$map/$key"
    stored "get with a binary key" "$dir/text" "$key"
    stored "a slash is the same escaped" "$dir/text" "${key//\//%2F}"

    refused "get of nothing" 404 NO_KEY "holds nothing" "$map/${k}nothing"
    wants "head of nothing" 404 -I "$map/${k}nothing"

    wants "put" 204 -X PUT -d one "$map/${k}tag"
    local old=$(header etag)
    answers "get" one "$map/${k}tag"
    wants "get of what one has" 304 -H "If-None-Match: \"x\", W/$old" "$map/${k}tag"
    same "get of what one has: etag" "$(header etag)" "$old"
    wants "get of another version" 200 -H 'If-None-Match: "x"' "$map/${k}tag"
    wants "put again" 204 -X PUT -d two "$map/${k}tag"
    [ "$(header etag)" != "$old" ] || stop "put again: the etag is the same"
    answers "get of a newer version" two -H "If-None-Match: $old" "$map/${k}tag"

    for ttl in 100 100s '1m 40s' 100000ms; do
        wants "put for $ttl" 204 -X PUT -d x "$map/${k}ttl?ttl=${ttl// /%20}"
        becomes "get for $ttl" 200 "$map/${k}ttl"
        between "ttl $ttl" "$(header vasto-ttl-ms)" 80000 100000
    done
    wants "put with a header's ttl" 204 -X PUT -H 'Vasto-Ttl: 500ms' -d x "$map/${k}ttl"
    becomes "a key ends" 404 "$map/${k}ttl"

    wants "delete" 204 -X DELETE "$map/${k}text"
    becomes "get after delete" 404 "$map/${k}text"
    wants "delete of nothing" 204 -X DELETE "$map/${k}text"
}

numbers() {
    local n=$map/${prefix}n
    wants "put a number" 204 -X PUT -d ' -2.50 ' "$n?type=number"
    answers "get a number" -2.5 "$n"
    typed "get a number" "text/plain; charset=utf-8"
    same "get a number: type" "$(header vasto-type)" number
    same "get a number: length" "$(header content-length)" 4
    for step in "add 5 2.5" "add 1e3 1002.5" "max 7 1002.5" "max 2000 2000" "min -1 -1"; do
        read -r op operand wanted <<<"$step"
        wants "$op $operand" 200 -d "$operand" "$n?op=$op"
        same "$op $operand" "$(cat "$dir/body")" "$wanted"
    done
    wants "add to nothing" 200 -d 1 "$map/${prefix}n2?op=add"
    same "add to nothing" "$(cat "$dir/body")" 1
    wants "append to nothing" 204 -d abc "$map/${prefix}a?op=append"
    wants "append" 204 --data-binary @"$dir/bytes" "$map/${prefix}a?op=append"
    { printf abc; cat "$dir/bytes"; } >"$dir/appended"
    stored "get after append" "$dir/appended" "${prefix}a"

    refused "add to bytes" 409 MISMATCH "holds bytes" -d 1 "$map/${prefix}a?op=add"
    refused "append to a number" 409 MISMATCH "holds a number" -d x "$n?op=append"
    refused "append beyond the limit" 400 INVALID 8388608 -d x "$map/${prefix}big?op=append"
    for number in x "" NaN inf 1e999; do
        refused "put of '$number' as a number" 400 INVALID "no number" -X PUT -d "$number" "$n?type=number"
        refused "add of '$number'" 400 INVALID "no number" -d "$number" "$n?op=add"
    done
    refused "post without op" 400 INVALID "op must be" -d 1 "$n"
    refused "post of another op" 400 INVALID "op must be" -d 1 "$n?op=divide"
    answers "get as before" -1 "$n"
}

refusals() {
    local key=$map/${prefix}x
    refused "no such keyspace" 404 NO_KEYSPACE "does not exist" "$base/v1/nowhere/x"
    refused "scan of no such keyspace" 404 NO_KEYSPACE "does not exist" "$base/v1/nowhere"
    refused "put to no such keyspace" 404 NO_KEYSPACE "does not exist" -X PUT -d x "$base/v1/nowhere/x"
    refused "no name" 400 INVALID "no name of a keyspace" "$base/v1/no%20name/x"
    refused "a name that is no text" 400 INVALID "no text" "$base/v1/%FF/x"
    refused "an empty key" 400 INVALID "key is empty" "$map/"
    refused "a long key" 400 INVALID "over the limit" "$map/$(printf 'x%.0s' {1..32769})"
    wants "a key as long as may be" 204 -X PUT -d x "$map/$prefix$(printf 'x%.0s' $(seq $((32768 - ${#prefix}))))"
    refused "a long value" 413 TOO_LONG 8388608 -T <(cat "$dir/big" "$dir/bytes") "$key"
    cat "$dir/big" "$dir/bytes" >"$dir/long"
    refused "a long value whose length is told" 413 TOO_LONG 8388608 -T "$dir/long" "$key"
    refused "a long batch" 413 TOO_LONG 16777216 --data-binary @<(cat "$dir/big" "$dir/big" "$dir/bytes") "$map"
    refused "an unknown parameter" 400 INVALID "not known here" "$key?x=1"
    refused "an unknown parameter of put" 400 INVALID "ttl, type are" -X PUT -d x "$key?x=1"
    refused "a parameter twice" 400 INVALID "given twice" -X PUT -d x "$key?ttl=1&ttl=2"
    refused "another type" 400 INVALID "bytes or number" -X PUT -d x "$key?type=list"
    for ttl in 0 -1 soon 1x; do
        refused "ttl $ttl" 400 INVALID "the ttl is" -X PUT -d x "$key?ttl=$ttl"
    done
    refused "a ttl beyond all time" 400 INVALID "beyond all time" -X PUT -d x "$key?ttl=99999999999999999"
    for condition in 'If-None-Match: *' 'If-Match: "x"'; do
        refused "put $condition" 501 UNCONDITIONAL "promise" -X PUT -d x -H "$condition" "$key"
        refused "delete $condition" 501 UNCONDITIONAL "promise" -X DELETE -H "$condition" "$key"
        refused "post $condition" 501 UNCONDITIONAL "promise" -d 1 -H "$condition" "$key?op=add"
    done
    refused "patch of a key" 405 METHOD_NOT_ALLOWED "use GET, HEAD, PUT, DELETE, POST" -X PATCH "$key"
    same "patch of a key: allow" "$(header allow)" "GET, HEAD, PUT, DELETE, POST"
    refused "delete of a keyspace" 405 METHOD_NOT_ALLOWED "use GET, POST" -X DELETE "$map"
    same "delete of a keyspace: allow" "$(header allow)" "GET, POST"
    becomes "none of it was done" 404 "$key"
}

# lines WHAT WANTED FILTER CURL'S ARGUMENTS: a scan's lines through a filter of jq
lines() {
    local deadline=$((SECONDS + patience)) got
    while wants "$1" 200 "${@:4}"; got=$(jq -r "$3" "$dir/body" | paste -sd ' '); [ "$got" != "$2" ]; do
        [ $SECONDS -gt $deadline ] && same "$1" "$got" "$2"
    done
    typed "$1" application/x-ndjson
}

scans() {
    local k=${prefix}scan: all
    all=$(printf "$k%03d " {0..299})
    all=${all% }
    for i in {0..299}; do printf '{"op":"put","key":"%s%03d","value":%d}\n' "$k" "$i" "$i"; done |
        jq -s '{operations: .}' >"$dir/puts"
    wants "300 puts" 200 -d @"$dir/puts" "$map"
    same "300 puts" "$(jq '[.results[] | select(.done)] | length' "$dir/body")" 300
    lines "scan" "$all" .key "$map?prefix=$k"
    lines "scan of values" "$(echo {0..299})" .value "$map?prefix=$k&values=true"
    lines "scan after a key" "${k}100 ${k}101" .key "$map?prefix=$k&after=${k}099&limit=2"
    lines "scan without values" "$k""000 null" '.key, .value' "$map?prefix=$k&values=false&limit=1"
    lines "scan of nothing" "" .key "$map?prefix=${k}x"
    wants "put of bytes" 204 --data-binary @"$dir/bytes" -X PUT "$map/${prefix}b%FFx"
    local key=$(printf '%sb\xffx' "$prefix" | base64 -w0)
    lines "scan of bytes" "$key $(base64 -w0 "$dir/bytes")" '.key_base64, .value_base64' "$map?prefix=${prefix}b%FF"
    wants "put with a ttl" 204 -X PUT -d x "$map/${prefix}e?ttl=1000"
    lines "scan of a ttl" true ".expiry_ms / 1000 - now | . > 900 and . < 1010" "$map?prefix=${prefix}e&limit=1"

    # A stream: its beginning can be had without the rest.
    head -c $((1 << 20)) "$dir/big" >"$dir/long"
    for i in {10..29}; do wants "put of 1 MiB" 204 -T "$dir/long" "$map/${prefix}long:$i"; done
    lines "scan of 20 MiB" "$(echo {10..29})" '.key[-2:]' "$map?prefix=${prefix}long:"
    between "bytes of a scan of 20 MiB" "$(stat -c %s "$dir/body")" $(((20 << 20) * 4 / 3)) $((28 << 20))
    same "a scan that is left" "$(curl -sSN -m 30 "$map?prefix=${prefix}long:" 2>"$dir/left" | head -c 8)" '{"key":"'

    for query in limit=0 limit=x limit=-1; do refused "$query" 400 INVALID "whole number above 0" "$map?$query"; done
    refused "values=maybe" 400 INVALID "true or false" "$map?values=maybe"
    refused "an unknown parameter of a scan" 400 INVALID "prefix, after, limit, values are" "$map?x=1"
}

# batch WHAT: sends $dir/asked, operations of which each is a line; the answer is in $dir/body
batch() {
    jq -s '{operations: .}' "$dir/asked" >"$dir/batch"
    wants "$1" 200 -d @"$dir/batch" "$map"
    typed "$1" application/json
}

batches() {
    local k=${prefix}batch:
    jq -nc --arg k "$k" '
        {op: "put", key: ($k + "text"), value: "grüße\n", ttl_ms: 100000},
        {op: "put", key_base64: ($k + "base64" | @base64), value_base64: "/wAB"},
        {op: "put", key: ($k + "n"), value: 2.5},
        {op: "put", key: ($k + "gone"), value: "x"},
        {op: "append", key: ($k + "a"), value: "abc"},
        {op: "add", key: ($k + "sum"), value: 7},
        {op: "get", key: ""}' >"$dir/asked"
    batch "a batch"
    same "a batch" "$(jq -c '[.results[] | .done // .error.code]' "$dir/body")" '[true,true,true,true,true,true,"INVALID"]'
    jq -nc --arg k "$k" '
        {op: "delete", key: ($k + "gone")},
        {op: "max", key: ($k + "n"), value: 3},
        {op: "min", key: ($k + "sum"), value: 6},
        {op: "append", key: ($k + "n"), value: "x"},
        {op: "add", key: ($k + "a"), value: 1},
        {op: "put", key: ($k + "x"), value: 1, ttl_ms: 0}' >"$dir/asked"
    batch "a second batch"
    same "a second batch" "$(jq -c '[.results[] | .done // .error.code]' "$dir/body")" \
        '[true,true,true,"MISMATCH","MISMATCH","INVALID"]'
    jq -nc --arg k "$k" '"text", "base64", "n", "gone", "a", "sum", "x" | {op: "get", key: ($k + .)}' >"$dir/asked"
    local wanted='["grüße\n","/wAB",3,false,"abc",6,false]' got deadline=$((SECONDS + patience))
    while batch "gets"; got=$(jq -c '[.results[] | .value // .value_base64 // .found]' "$dir/body"); [ "$got" != "$wanted" ]; do
        [ $SECONDS -gt $deadline ] && same "gets" "$got" "$wanted"
    done
    same "a ttl" "$(jq '.results[0].expiry_ms / 1000 - now | . > 80 and . < 101' "$dir/body")" true
    : >"$dir/asked"
    batch "an empty batch"

    refused "no JSON" 400 INVALID "is no batch" -d x "$map"
    refused "other JSON" 400 INVALID "is no batch" -d '{"operation": []}' "$map"
    while IFS='|' read -r operation words; do
        refused "$operation" 400 INVALID "$words" -d "{\"operations\": [{\"op\": \"get\", \"key\": \"x\"}, $operation]}" "$map"
    done <<'END'
{"op": "divide", "key": "x"}|unknown variant
{"op": "get", "key": "x", "ttl": 1}|unknown field
{"op": "get"}|operations[1]: it must have either key or key_base64
{"op": "get", "key": "x", "key_base64": "eA=="}|operations[1]: it must have either key
{"op": "get", "key_base64": "?"}|operations[1]: key_base64
{"op": "get", "key": "x", "value": 1}|operations[1]: get and delete take no value
{"op": "put", "key": "x"}|operations[1]: a put must have a value
{"op": "put", "key": "x", "value": true}|operations[1]: the value true
{"op": "put", "key": "x", "value": 1, "value_base64": "eA=="}|operations[1]: it must have either value
{"op": "put", "key": "x", "value_base64": "?"}|operations[1]: value_base64
{"op": "add", "key": "x", "value": "x"}|operations[1]: add, max and min take a number
{"op": "append", "key": "x", "value": 1}|operations[1]: append takes bytes
{"op": "append", "key": "x", "value": "x", "ttl_ms": 1}|operations[1]: only put takes ttl_ms
END
}

pages
values
numbers
refusals
scans
batches
echo ready

# Standard input has ended; one that says nothing is waited for a little.
ended() {
    local code
    read -r -t 0.05 _
    code=$?
    [ $code -eq 1 ]
}

key=$map/${prefix}k
declare -a last
declare -A written
rounds=0 increments=0
until ended; do
    : >"$dir/asked"
    for j in {0..7}; do
        i=$(((rounds * 9 + j) % keys))
        last[i]="$i in round $rounds" written["${last[i]}"]=1
        printf '{"op":"put","key":"%sk%d","value":"%s"}\n' "$prefix" "$i" "${last[i]}" >>"$dir/asked"
    done
    batch "puts"
    same "puts" "$(jq -c .results "$dir/body")" "[$(printf '{"done":true},%.0s' {1..7}){\"done\":true}]"
    i=$(((rounds * 9 + 8) % keys))
    last[i]="$i in round $rounds" written["${last[i]}"]=1
    wants "put" 204 -X PUT -d "${last[i]}" "$key$i"
    ask "$key$i"
    got=$(cat "$dir/body")
    # Nothing may have been there before.
    [ "$status" = 404 ] && [ "$(jq -r .error.code "$dir/body")" = NO_KEY ] ||
        { [ "$status" = 200 ] && [ "${got%% *}" = $i ] && [ -n "${written[$got]-}" ]; } ||
        stop "get ${prefix}k$i: got $status $(body), wanted something that was written to it"
    wants "increment" 200 -d 1 "$map/${prefix}counter?op=add"
    increments=$((increments + 1))
    rounds=$((rounds + 1))
done

for i in "${!last[@]}"; do printf '{"op":"get","key":"%sk%d"}\n' "$prefix" "$i"; done >"$dir/asked"
printf '{"op":"get","key":"%scounter"}\n' "$prefix" >>"$dir/asked"
wanted=$(printf '%s\n' "${last[@]}" "$increments")
deadline=$((SECONDS + patience))
while batch "reading back"; got=$(jq -r '.results[] | .value // .error.message // "nothing"' "$dir/body"); [ "$got" != "$wanted" ]; do
    if [ $SECONDS -gt $deadline ]; then
        diff <(echo "$got") <(echo "$wanted")
        exit 1
    fi
done
echo "$rounds rounds, all as written"
