package main

import (
	"strings"
	"testing"
	"time"

	"github.com/opendepot/depot/controlplane"
)

func TestTimes(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		specs []string
		want  func(*controlplane.Times)
		err   string
	}{
		"none":     {nil, func(*controlplane.Times) {}, ""},
		"two":      {[]string{"lease-ttl=2m", "drain=90s"}, func(t *controlplane.Times) { t.LeaseTTL, t.Drain = 2*time.Minute, 90*time.Second }, ""},
		"unknown":  {[]string{"lease=2m"}, nil, `"lease" is not known: use one of agent-silent, `},
		"no value": {[]string{"drain"}, nil, `"" is not a positive duration`},
		"negative": {[]string{"drain=-1s"}, nil, `"-1s" is not a positive duration`},
		"crossed":  {[]string{"lease-renew=2m"}, nil, "has to be shorter than lease-ttl"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := (&config{Times: tt.specs}).times()
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			want := controlplane.DefaultTimes()
			tt.want(&want)
			if err != nil || got != want {
				t.Errorf("times %+v, %v, want %+v", got, err, want)
			}
		})
	}
}
