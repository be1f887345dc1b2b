package configure

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// jsonText is a JSON object as a person wrote it. Its methods change single
// values and leave every other byte as it is, so that keys that this program
// does not know, and the order and indentation of all, survive.
type jsonText []byte

// member is one member of an object: the offsets of its key's first byte, its
// value's first byte, and the byte behind the value.
type member struct {
	key                        string
	keyStart, valueAt, valueTo int
}

// parseJSONText checks that text holds one JSON object. The error says at
// which line and column it does not.
func parseJSONText(text []byte) (jsonText, error) {
	if len(bytes.TrimSpace(text)) == 0 {
		return jsonText("{}\n"), nil
	}
	var object map[string]json.RawMessage
	err := json.Unmarshal(text, &object)
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &syntax):
		before := text[:min(max(int(syntax.Offset)-1, 0), len(text))]
		return nil, fmt.Errorf("line %d, column %d: %w", bytes.Count(before, []byte("\n"))+1, len(before)-bytes.LastIndexByte(before, '\n'), err)
	case err != nil || object == nil:
		return nil, errors.New("not a JSON object")
	}
	return jsonText(text), nil
}

// object returns the members of the object that begins at start, and the
// offset of its closing brace.
func (t jsonText) object(start int) ([]member, int) {
	dec := json.NewDecoder(bytes.NewReader(t[start:]))
	dec.Token() //nolint:errcheck,gosec // the opening brace of a text that is known to be valid
	var members []member
	for dec.More() {
		m := member{keyStart: t.skip(start + int(dec.InputOffset()))}
		key, err := dec.Token()
		if err != nil {
			break // cannot be: the text is valid
		}
		m.key, _ = key.(string) // an object's key is a string
		m.valueAt = t.skip(start + int(dec.InputOffset()))
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			break // cannot be: the text is valid
		}
		m.valueTo = start + int(dec.InputOffset())
		members = append(members, m)
	}
	return members, t.skip(start + int(dec.InputOffset()))
}

// skip returns the offset of the next byte that is neither white space nor a
// separator.
func (t jsonText) skip(at int) int {
	for at < len(t) && strings.IndexByte(" \t\r\n,:", t[at]) >= 0 {
		at++
	}
	return at
}

// find returns the last member with that key, as decoders take it. Top-level
// keys are compared like encoding/json does for structs: in any case.
func find(members []member, key string, fold bool) (member, bool) {
	for _, m := range slices.Backward(members) {
		if m.key == key || fold && strings.EqualFold(m.key, key) {
			return m, true
		}
	}
	return member{}, false
}

// get returns the JSON value at a path of at most two keys.
func (t jsonText) get(path ...string) (json.RawMessage, bool) {
	at := t.skip(0)
	for i, key := range path {
		if at >= len(t) || t[at] != '{' {
			return nil, false
		}
		members, _ := t.object(at)
		m, ok := find(members, key, i == 0)
		if !ok {
			return nil, false
		}
		if i == len(path)-1 {
			return json.RawMessage(t[m.valueAt:m.valueTo]), true
		}
		at = m.valueAt
	}
	return nil, false
}

// set puts a JSON value at key, or at key in the object at parent. An object
// that is missing is made.
func (t jsonText) set(value string, parent, key string) jsonText {
	if parent == "" {
		return t.setMember(t.skip(0), 0, key, value, true)
	}
	members, _ := t.object(t.skip(0))
	m, ok := find(members, parent, true)
	if !ok || t[m.valueAt] != '{' {
		unit := t.indent()
		inner := "{\n" + unit + unit + quote(key) + ": " + value + "\n" + unit + "}"
		return t.setMember(t.skip(0), 0, parent, inner, true)
	}
	return t.setMember(m.valueAt, 1, key, value, false)
}

func (t jsonText) setMember(object, depth int, key, value string, fold bool) jsonText {
	members, end := t.object(object)
	if m, ok := find(members, key, fold); ok {
		return t.splice(m.valueAt, m.valueTo, value)
	}
	text := quote(key) + ": " + value
	if len(members) == 0 {
		unit := t.indent()
		outer := strings.Repeat(unit, depth)
		return t.splice(object, end+1, "{\n"+outer+unit+text+"\n"+outer+"}")
	}
	// The new member stands behind the last one, as far from it as the first
	// one stands from its brace.
	gap := string(t[object+1 : members[0].keyStart])
	last := members[len(members)-1]
	return t.splice(last.valueTo, last.valueTo, ","+gap+text)
}

// remove takes out key, or key in the object at parent; with prune set, also
// the parent if nothing else is in it.
func (t jsonText) remove(parent, key string, prune bool) jsonText {
	at := t.skip(0)
	if parent != "" {
		members, _ := t.object(at)
		m, ok := find(members, parent, true)
		if !ok || t[m.valueAt] != '{' {
			return t
		}
		if inner, _ := t.object(m.valueAt); prune && len(inner) == 1 && inner[0].key == key {
			return t.remove("", m.key, false)
		}
		at = m.valueAt
	}
	members, end := t.object(at)
	for i, m := range slices.Backward(members) {
		if m.key != key {
			continue
		}
		switch {
		case len(members) == 1:
			return t.splice(at+1, end, "")
		case i == 0:
			return t.splice(members[0].keyStart, members[1].keyStart, "")
		default:
			return t.splice(members[i-1].valueTo, m.valueTo, "")
		}
	}
	return t
}

// indent is the text's own unit of indentation; docker's is a tab.
func (t jsonText) indent() string {
	members, _ := t.object(t.skip(0))
	if len(members) == 0 {
		return "\t"
	}
	line := bytes.LastIndexByte(t[:members[0].keyStart], '\n')
	if line < 0 || line+1 == members[0].keyStart {
		return "\t"
	}
	return string(t[line+1 : members[0].keyStart])
}

func (t jsonText) splice(from, to int, text string) jsonText {
	out := make(jsonText, 0, len(t)+len(text))
	out = append(out, t[:from]...)
	out = append(out, text...)
	return append(out, t[to:]...)
}

func quote(s string) string {
	text, err := json.Marshal(s)
	if err != nil {
		panic(err) // a string always has a JSON form
	}
	return string(text)
}
