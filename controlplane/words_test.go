package controlplane_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/opendepot/depot/controlplane"
)

func TestWords(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ text, want string }{
		"plain":         {"buildkitd was killed", "buildkitd was killed"},
		"of the world":  {"es gibt größere Überläufe 😀", "es gibt größere Überläufe 😀"},
		"lines":         {"one\ntwo\r\n", "one two"},
		"a terminal's":  {"\x1b[2J\x1b]0;owned\aok", "[2J ]0;owned ok"},
		"right to left": {"safe\u202egpj.exe", "safe gpj.exe"},
		"C1 controls":   {"a\u009b31mb", "a 31mb"},
		"no UTF-8":      {"a\xffb", "a\ufffdb"},
		"empty":         {"", ""},
	} {
		if got := controlplane.Words(test.text); got != test.want {
			t.Errorf("%s: got %q, want %q", name, got, test.want)
		}
	}
	long := controlplane.Words(strings.Repeat("ü", 1<<20))
	if len(long) > 1000 || len(long) < 990 || !utf8.ValidString(long) || !strings.HasSuffix(long, "…") {
		t.Errorf("a long text has %d bytes", len(long))
	}
	if n := len(controlplane.WordList(make([]string, 1000))); n != 20 {
		t.Errorf("%d of 1000 warnings are kept", n)
	}
}
