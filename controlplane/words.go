package controlplane

import (
	"strings"
	"unicode"
)

// maxWords bounds what is kept of a reason, in bytes.
const maxWords = 1000

// Words returns what a machine or agent says for people as it is kept and
// shown: one line, at most 1000 bytes, and nothing that steers a terminal.
// Whoever broke out of a build speaks for its machine.
func Words(text string) string {
	// Cut first, so that an endless text costs nothing.
	if len(text) > maxWords {
		text = strings.ToValidUTF8(text[:maxWords-len("…")], "") + "…"
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text))
}

// WordList is [Words] of each text, of the first 20.
func WordList(texts []string) []string {
	var out []string
	for _, t := range texts[:min(len(texts), 20)] {
		out = append(out, Words(t))
	}
	return out
}
