// Tests a gateway's Redis side with go-redis, over versions 2 and 3 of the protocol: goredis HOST:PORT
// Checks once, prints `ready`, writes until standard input ends, then reads all of it back.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	keys     = 500
	puts     = 16
	patience = 10 * time.Second
)

var (
	ctx = context.Background()
	// Of this run alone, since nothing is cleaned up.
	prefix = fmt.Sprintf("goredis:%x:", time.Now().UnixNano())
)

func connect(protocol, retries int) *redis.Client {
	return redis.NewClient(&redis.Options{
		Addr: os.Args[1], Protocol: protocol, MaxRetries: retries,
		ReadTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second,
	})
}

func stop(format string, args ...any) {
	fmt.Printf(format+"\n", args...)
	os.Exit(1)
}

func fail(what string, got, wanted any) {
	stop("%s: got %.300s, wanted %.300s", what, show(got), show(wanted))
}

func show(value any) string {
	if err, ok := value.(error); ok {
		return err.Error()
	}
	return fmt.Sprintf("%#v", value)
}

// outcome is what was answered: a value, an error, or nil for nothing.
func outcome[T any](got T, err error) any {
	if errors.Is(err, redis.Nil) {
		return nil
	}
	if err != nil {
		return err
	}
	return got
}

type command[T any] interface{ Result() (T, error) }

func same[T any](what string, asked command[T], wanted any) {
	if got := outcome(asked.Result()); !reflect.DeepEqual(got, wanted) {
		fail(what, got, wanted)
	}
}

// becomes asks again: a read may be older than the newest write for a moment.
func becomes[T any](what string, ask func() command[T], wanted any) {
	deadline := time.Now().Add(patience)
	for {
		got := outcome(ask().Result())
		if reflect.DeepEqual(got, wanted) {
			return
		}
		if time.Now().After(deadline) {
			fail(what, got, wanted)
		}
	}
}

func between(what string, asked command[time.Duration], least, most time.Duration) {
	if got, err := asked.Result(); err != nil || got < least || got > most {
		fail(what, outcome(got, err), fmt.Sprintf("%v to %v", least, most))
	}
}

func refused[T any](what, words string, asked command[T]) {
	got, err := asked.Result()
	var said redis.Error
	if !errors.As(err, &said) || !strings.Contains(strings.ToLower(said.Error()), words) {
		fail(what, outcome(got, err), "an error with '"+words+"'")
	}
}

func scanned(r *redis.Client, match string, count int64) []string {
	var found []string
	for each := r.Scan(ctx, 0, match, count).Iterator(); ; {
		if !each.Next(ctx) {
			if err := each.Err(); err != nil {
				stop("scan %s: %v", match, err)
			}
			slices.Sort(found)
			return found
		}
		found = append(found, each.Val())
	}
}

func scans(r *redis.Client, match string, count int64, wanted []string) {
	deadline := time.Now().Add(patience)
	for {
		found := scanned(r, match, count)
		if slices.Equal(found, wanted) {
			return
		}
		if time.Now().After(deadline) {
			fail("scan "+match, found, wanted)
		}
	}
}

func checks(protocol int) {
	r := connect(protocol, 0)
	k := func(name string) string { return fmt.Sprintf("%sv%d:%s", prefix, protocol, name) }
	get := func(name string) func() command[string] {
		return func() command[string] { return r.Get(ctx, k(name)) }
	}
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}

	for _, value := range []struct{ name, bytes string }{
		{"text", "grüße, 世界"},
		{"empty", ""},
		{"bytes", string(all)},
		{"lines", "\r\n$5\r\n+OK\r\n"},
		{"number", "-12.5"},
		{"like a number", "007"},
		{"big", string(bytes.Repeat(all, 7*4096))},
	} {
		same("set "+value.name, r.Set(ctx, k(value.name), value.bytes, 0), "OK")
		becomes("get "+value.name, get(value.name), value.bytes)
		same("strlen "+value.name, r.StrLen(ctx, k(value.name)), int64(len(value.bytes)))
	}
	same("set with a binary key", r.Set(ctx, k(string(all)), "x", 0), "OK")
	becomes("get with a binary key", get(string(all)), "x")
	same("get of nothing", r.Get(ctx, k("nothing")), nil)

	ttl := func() command[time.Duration] { return r.TTL(ctx, k("ex")) }
	same("set EX", r.Set(ctx, k("ex"), "x", 100*time.Second), "OK")
	becomes("exists after EX", func() command[int64] { return r.Exists(ctx, k("ex")) }, int64(1))
	between("ttl after EX", ttl(), 90*time.Second, 100*time.Second)
	between("pttl after EX", r.PTTL(ctx, k("ex")), 90*time.Second, 100*time.Second)
	same("persist", r.Persist(ctx, k("ex")), true)
	becomes("ttl after persist", ttl, time.Duration(-1))
	same("persist again", r.Persist(ctx, k("ex")), false)
	same("expire", r.Expire(ctx, k("ex"), 50*time.Second), true)
	same("set KEEPTTL", r.Set(ctx, k("ex"), "y", redis.KeepTTL), "OK")
	becomes("value after KEEPTTL", get("ex"), "y")
	between("ttl after KEEPTTL", ttl(), 40*time.Second, 50*time.Second)
	at := time.Now().Add(time.Hour).Truncate(time.Second)
	same("expireat", r.ExpireAt(ctx, k("ex"), at), true)
	becomes("expiretime", func() command[time.Duration] { return r.ExpireTime(ctx, k("ex")) }, time.Duration(at.Unix())*time.Second)
	same("pexpireat", r.PExpireAt(ctx, k("ex"), at.Add(time.Second)), true)
	// The time is taken as one from now on, so that a few milliseconds come to it.
	end := time.Duration(at.UnixMilli()+1000) * time.Millisecond
	between("pexpiretime", r.PExpireTime(ctx, k("ex")), end, end+time.Second)
	same("getex", r.GetEx(ctx, k("ex"), 300*time.Millisecond), "y")
	becomes("a key ends", get("ex"), nil)
	same("ttl of nothing", ttl(), time.Duration(-2))
	same("setex", r.SetEx(ctx, k("setex"), "x", 100*time.Second), "OK")
	same("expire of nothing", r.Expire(ctx, k("nothing"), time.Minute), false)

	var pairs, values []any
	var names []string
	for i := range 20 {
		pairs = append(pairs, k(fmt.Sprint("m", i)), fmt.Sprint("v", i))
		names = append(names, k(fmt.Sprint("m", i)))
		values = append(values, fmt.Sprint("v", i))
	}
	same("mset", r.MSet(ctx, pairs...), "OK")
	becomes("mget", func() command[[]any] { return r.MGet(ctx, append(names, k("nothing"))...) }, append(values, nil))

	same("incr", r.Incr(ctx, k("n")), int64(1))
	same("incrby", r.IncrBy(ctx, k("n"), 41), int64(42))
	same("decr", r.Decr(ctx, k("n")), int64(41))
	same("decrby", r.DecrBy(ctx, k("n"), 50), int64(-9))
	same("incrbyfloat", r.IncrByFloat(ctx, k("n"), 0.5), -8.5)
	same("set of a number", r.Set(ctx, k("n"), 10, 0), "OK")
	same("incr after set", r.Incr(ctx, k("n")), int64(11))

	same("append to nothing", r.Append(ctx, k("a"), "abc"), int64(3))
	same("append", r.Append(ctx, k("a"), "\xff\x00"), int64(5))
	becomes("get after append", get("a"), "abc\xff\x00")
	same("getrange", r.GetRange(ctx, k("a"), 1, -3), "bc")

	same("set GET of nothing", r.SetArgs(ctx, k("s"), "one", redis.SetArgs{Get: true}), nil)
	same("set GET", r.SetArgs(ctx, k("s"), "two", redis.SetArgs{Get: true}), "one")
	same("getset", r.GetSet(ctx, k("s"), "three"), "two")
	same("exists", r.Exists(ctx, k("s"), k("a"), k("nothing")), int64(2))
	same("touch", r.Touch(ctx, k("s"), k("nothing")), int64(1))
	same("type", r.Type(ctx, k("s")), "string")
	same("getdel", r.GetDel(ctx, k("s")), "three")
	becomes("get after getdel", get("s"), nil)
	same("getdel of nothing", r.GetDel(ctx, k("s")), nil)
	same("del", r.Del(ctx, k("a"), k("n"), k("nothing")), int64(2))
	becomes("mget after del", func() command[[]any] { return r.MGet(ctx, k("a"), k("n")) }, []any{nil, nil})
	same("unlink of nothing", r.Unlink(ctx, k("a")), int64(0))

	many := map[string]any{}
	var wanted, some []string
	for i := range 500 {
		key := k(fmt.Sprint("scan:", i))
		many[key] = i
		wanted = append(wanted, key)
		if i >= 10 && (i%10 == 3 || i%10 == 4) {
			some = append(some, key)
		}
	}
	slices.Sort(wanted)
	slices.Sort(some)
	same("mset of 500", r.MSet(ctx, many), "OK")
	scans(r, k("scan:*"), 0, wanted)
	scans(r, k("scan:*"), 77, wanted)
	scans(r, k("scan:*?[34]"), 1000, some)

	var asked []redis.Cmder
	answers := []string{}
	_, err := r.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i := range 40 {
			key, value := k(fmt.Sprint("p", i)), fmt.Sprint("v", i)
			asked = append(asked, pipe.Set(ctx, key, value, 0), pipe.Get(ctx, key), pipe.Incr(ctx, k("pn")),
				pipe.Append(ctx, key, "xyz"), pipe.Exists(ctx, k("nothing")))
			answers = append(answers, "OK", value, fmt.Sprint(i+1), fmt.Sprint(len(value)+3), "0")
		}
		return nil
	})
	if err != nil {
		stop("a pipeline of 200: %v", err)
	}
	for i, command := range asked {
		if !strings.HasSuffix(command.String(), ": "+answers[i]) {
			fail("a pipeline of 200", command.String(), answers[i])
		}
	}
	pipe := r.Pipeline()
	set, incr, text := pipe.Set(ctx, k("text"), "text", 0), pipe.Incr(ctx, k("text")), pipe.Get(ctx, k("text"))
	pipe.Exec(ctx)
	same("set in a pipeline with an error", set, "OK")
	refused("incr in a pipeline with an error", "not an integer", incr)
	same("get in a pipeline with an error", text, "text")

	refused("incrbyfloat on text", "not a valid float", r.IncrByFloat(ctx, k("text"), 1.5))
	refused("append to a number", "wrongtype", r.Append(ctx, k("pn"), "x"))
	refused("setnx", "not served", r.SetNX(ctx, k("text"), "x", 0))
	refused("set XX", "not served", r.SetXX(ctx, k("text"), "x", 0))
	refused("an unknown command", "unknown command", r.Do(ctx, "FROBNICATE", "x"))
	refused("lpush", "unknown command", r.LPush(ctx, k("list"), "x"))
	refused("keys", "use scan", r.Keys(ctx, "*"))
	refused("eval", "not served", r.Eval(ctx, "return 1", nil))
	refused("get without a key", "wrong number of arguments", r.Do(ctx, "GET"))
	refused("an empty key", "key", r.Set(ctx, "", "x", 0))
	_, err = r.TxPipelined(ctx, func(pipe redis.Pipeliner) error { return pipe.Set(ctx, k("transaction"), "x", 0).Err() })
	if err == nil || !strings.Contains(err.Error(), "not served") {
		fail("a transaction", err, "an error with 'not served'")
	}
	becomes("as before", get("text"), "text")

	same("ping", r.Ping(ctx), "PONG")
	same("echo", r.Echo(ctx, "x"), "x")
	one := r.Conn()
	same("select by name", one.Do(ctx, "SELECT", "gateway"), "OK")
	becomes("get after select", func() command[string] { return one.Get(ctx, k("text")) }, "text")
	refused("select of what is not there", "does not exist", one.Select(ctx, 7))
	one.Close()
	r.Close()
}

func main() {
	checks(2)
	checks(3)

	ended := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	fmt.Println("ready")

	// Nothing is tried again behind our back: each error shows, and each increment is sent once.
	clients := []*redis.Client{connect(2, -1), connect(3, -1)}
	key := func(i int) string { return fmt.Sprint(prefix, "k", i) }
	counter := prefix + "counter"
	last, written := map[int]string{}, map[string]bool{}
	rounds, increments := 0, 0
	for writing := true; writing; {
		r := clients[rounds%2]
		var ids []int
		var names []string
		pipe := r.Pipeline()
		for j := range puts {
			i := (rounds*puts + j) % keys
			value := fmt.Sprintf("%d in round %d", i, rounds)
			ids, names = append(ids, i), append(names, key(i))
			written[value], last[i] = true, value
			pipe.Set(ctx, key(i), value, 0)
		}
		if _, err := pipe.Exec(ctx); err != nil {
			stop("set: %v", err)
		}
		got, err := r.MGet(ctx, names...).Result()
		if err != nil {
			stop("mget: %v", err)
		}
		for at, i := range ids {
			value, _ := got[at].(string)
			if got[at] != nil && !(written[value] && strings.HasPrefix(value, strconv.Itoa(i)+" ")) {
				fail("get "+key(i), value, "something that was written to it")
			}
		}
		if err := r.Incr(ctx, counter).Err(); err != nil {
			stop("incr: %v", err)
		}
		increments++
		rounds++
		select {
		case <-ended:
			writing = false
		case <-time.After(5 * time.Millisecond):
		}
	}

	becomes(counter, func() command[string] { return clients[0].Get(ctx, counter) }, strconv.Itoa(increments))
	wrong := map[int]any{}
	for deadline := time.Now().Add(patience); ; {
		clear(wrong)
		for i, wanted := range last {
			if got := outcome(clients[1].Get(ctx, key(i)).Result()); got != wanted {
				wrong[i] = got
			}
		}
		if len(wrong) == 0 {
			break
		}
		if time.Now().After(deadline) {
			for i, got := range wrong {
				fmt.Printf("%s: got %s, wanted %s\n", key(i), show(got), show(last[i]))
			}
			os.Exit(1)
		}
	}
	fmt.Printf("%d rounds, all as written\n", rounds)
}
