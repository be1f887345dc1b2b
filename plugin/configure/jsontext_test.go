package configure

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestJSONTextSetAndRemove(t *testing.T) {
	t.Parallel()
	tests := map[string]struct{ before, after string }{
		"empty object":       {"{}\n", "{\n\t\"aliases\": {\n\t\t\"builder\": \"buildx\"\n\t}\n}\n"},
		"docker's own":       {"{\n\t\"auths\": {}\n}", "{\n\t\"auths\": {},\n\t\"aliases\": {\n\t\t\"builder\": \"buildx\"\n\t}\n}"},
		"two spaces":         {"{\n  \"auths\": {\n    \"x\": {}\n  }\n}", "{\n  \"auths\": {\n    \"x\": {}\n  },\n  \"aliases\": {\n    \"builder\": \"buildx\"\n  }\n}"},
		"one line":           {`{"a":1}`, "{\"a\":1,\"aliases\": {\n\t\t\"builder\": \"buildx\"\n\t}}"},
		"other aliases":      {`{"aliases": {"x": "y"}, "z": 1}`, `{"aliases": {"x": "y","builder": "buildx"}, "z": 1}`},
		"case and strings":   {`{"Aliases": {"x": "a\"},{"}, "z": "}"}`, `{"Aliases": {"x": "a\"},{","builder": "buildx"}, "z": "}"}`},
		"unknown keys":       {"{\n\t\"unknown\": [1, 2,  3],\n\t\"aliases\": {\n\t\t\"x\": \"y\"\n\t}\n}\n", "{\n\t\"unknown\": [1, 2,  3],\n\t\"aliases\": {\n\t\t\"x\": \"y\",\n\t\t\"builder\": \"buildx\"\n\t}\n}\n"},
		"unicode and spaces": {"{ \"ü\" : \"ß\" }", "{ \"ü\" : \"ß\", \"aliases\": {\n\t\t\"builder\": \"buildx\"\n\t} }"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text, err := parseJSONText([]byte(test.before))
			if err != nil {
				t.Fatal(err)
			}
			set := text.set(aliasValue, aliasesKey, builderKey)
			if diff := cmp.Diff(test.after, string(set)); diff != "" {
				t.Errorf("set (-want +got):\n%s", diff)
			}
			if _, err := parseJSONText(set); err != nil {
				t.Errorf("set made invalid JSON: %v", err)
			}
			again, err := parseJSONText(set.remove(aliasesKey, builderKey, true))
			if err != nil {
				t.Errorf("remove made invalid JSON: %v", err)
			}
			if name != "empty object" && name != "docker's own" {
				if diff := cmp.Diff(test.before, string(again)); diff != "" {
					t.Errorf("remove (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestJSONTextSetReplacesValue(t *testing.T) {
	t.Parallel()
	text := jsonText(`{"aliases": { "builder" : "mine" , "x": 1}, "cliPluginsExtraDirs": ["/a"]}`)
	set := text.set(aliasValue, aliasesKey, builderKey).set(`["/b","/a"]`, "", extraDirsKey)
	want := `{"aliases": { "builder" : "buildx" , "x": 1}, "cliPluginsExtraDirs": ["/b","/a"]}`
	if diff := cmp.Diff(want, string(set)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	back := set.set(`"mine"`, aliasesKey, builderKey).set(`["/a"]`, "", extraDirsKey)
	if diff := cmp.Diff(string(text), string(back)); diff != "" {
		t.Errorf("back (-want +got):\n%s", diff)
	}
}

func TestParseJSONTextNamesThePosition(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"{\n\t\"a\": x\n}": "line 2, column 7",
		"[]":               "not a JSON object",
		"null":             "not a JSON object",
		"{\"a\": 1":        "line 1, column 7",
	} {
		_, err := parseJSONText([]byte(text))
		if err == nil || !containsText(err.Error(), want) {
			t.Errorf("parseJSONText(%q) = %v, want %q in it", text, err, want)
		}
	}
}
