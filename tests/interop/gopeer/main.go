// A peer built on the Go library, for the interoperation tests. It prints one JSON line for each result.
//
//	gopeer write URL N [PAYLOAD_BYTES]   send N envelopes
//	gopeer read URL                      receive until an error, print what came
//	gopeer pipe                          receive on stdio:// and send each one back, until the input ends
//	gopeer listen ADDR N                 take N envelopes by HTTP, print what came
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/greynewell/mist-go/protocol"
	"github.com/greynewell/mist-go/transport"
)

type seen struct {
	ID       string          `json:"id"`
	Type     string          `json:"type"`
	Payload  json.RawMessage `json:"payload"`
	Verified bool            `json:"verified"`
	Error    string          `json:"error,omitempty"`
}

var ctx = context.Background()

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	out := json.NewEncoder(os.Stdout)
	switch args[0] {
	case "write":
		count, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		fill := 0
		if len(args) > 3 {
			if fill, err = strconv.Atoi(args[3]); err != nil {
				return err
			}
		}
		t, err := transport.Dial(args[1])
		if err != nil {
			return err
		}
		for i := 0; i < count; i++ {
			msg, err := sample(i, fill)
			if err != nil {
				return err
			}
			if err := t.Send(ctx, msg); err != nil {
				return err
			}
		}
		return t.Close()
	case "read":
		t, err := transport.Dial(args[1])
		if err != nil {
			return err
		}
		for {
			msg, err := t.Receive(ctx)
			if err != nil {
				if err := out.Encode(seen{Error: err.Error()}); err != nil {
					return err
				}
				return t.Close()
			}
			if err := out.Encode(show(msg)); err != nil {
				return err
			}
		}
	case "pipe":
		t, err := transport.Dial("stdio://")
		if err != nil {
			return err
		}
		for {
			msg, err := t.Receive(ctx)
			if err != nil {
				return nil // the input ended
			}
			if err := t.Send(ctx, msg); err != nil {
				return err
			}
		}
	case "listen":
		count, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		t := transport.NewHTTP("http://unused.invalid/mist")
		go func() {
			if err := t.ListenForMessages(args[1]); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}()
		limited, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		for i := 0; i < count; i++ {
			msg, err := t.Receive(limited)
			if err != nil {
				return err
			}
			if err := out.Encode(show(msg)); err != nil {
				return err
			}
		}
		return t.Close()
	}
	return fmt.Errorf("unknown command %q", args[0])
}

func show(msg *protocol.Message) seen {
	return seen{ID: msg.ID, Type: msg.Type, Payload: msg.Payload, Verified: msg.Checksum != 0 && msg.VerifyChecksum()}
}

// sample is the i-th of the ten payload types, filled up where a size is asked for.
func sample(i, fill int) (*protocol.Message, error) {
	text := "a<b>&\u2028é🌍\x01\t\"\\/" + strings.Repeat("x", fill)
	types := []struct {
		name    string
		payload any
	}{
		{protocol.TypeHealthPing, protocol.HealthPing{From: text}},
		{protocol.TypeHealthPong, protocol.HealthPong{From: text, Version: "1", Uptime: 60}},
		{protocol.TypeTraceSpan, protocol.TraceSpan{
			TraceID: strings.Repeat("a", 32), SpanID: strings.Repeat("b", 32), Operation: text, StartNS: int64(i),
			EndNS: int64(i) + 1, Status: "ok", Attrs: map[string]any{"z": 1e20, "a": 1e-7, "n": nil},
		}},
		{protocol.TypeTraceAlert, protocol.TraceAlert{Level: "critical", Metric: "m", Value: 1.5, Threshold: 1, Message: text}},
		{protocol.TypeInferRequest, protocol.InferRequest{Model: "auto", Messages: []protocol.ChatMessage{{Role: "user", Content: text}}}},
		{protocol.TypeInferResponse, protocol.InferResponse{Model: "m", Provider: "p", Content: text, TokensIn: 1 << 60, TokensOut: 2, FinishReason: "stop"}},
		{protocol.TypeEvalRun, protocol.EvalRun{Suite: text}},
		{protocol.TypeEvalResult, protocol.EvalResult{Suite: "s", Task: text, Passed: true, Score: 0.25}},
		{protocol.TypeDataEntities, protocol.DataEntities{Count: i, Format: "jsonl", Path: text}},
		{protocol.TypeDataSchema, protocol.DataSchema{Name: text}},
	}
	one := types[i%len(types)]
	msg, err := protocol.New(protocol.SourceMatchSpec, one.name, one.payload)
	if err != nil {
		return nil, err
	}
	msg.ID = fmt.Sprintf("%032x", i)
	msg.ComputeChecksum()
	return msg, nil
}
