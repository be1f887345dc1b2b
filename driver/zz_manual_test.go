package driver

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/internal/mtls"
)

func TestManual(t *testing.T) {
	if os.Getenv("MANUAL") == "" {
		t.SkipNow()
	}
	w := newWorld(t)
	identity := new(mtls.Identity)
	_ = identity.Set(w.project.serverLeaf(t, machineName))
	anchors, _ := mtls.NewAnchors([][]byte{w.project.cert.Raw})
	l, _ := net.Listen("tcp", "127.0.0.1:0")
	tl := tls.NewListener(l, mtls.Server{Identity: identity, Anchors: anchors, NextProtos: []string{"h2"}, Admit: func(*x509.Certificate) error { return nil }}.Config())
	go func() {
		for {
			c, err := tl.Accept()
			if err != nil {
				return
			}
			go func() {
				u, err := net.Dial("unix", "/tmp/driver/bk/buildkitd.sock")
				if err != nil {
					c.Close()
					return
				}
				go func() { io.Copy(u, c); u.(*net.UnixConn).CloseWrite() }()
				io.Copy(c, u)
				c.Close()
			}()
		}
	}()
	w.machines = []*machine{{id: mch1, address: l.Addr().String()}}
	w.arch = []*depotv1.Architecture{{Name: "amd64", MachineState: depotv1.MachineState_MACHINE_STATE_READY}, {Name: "arm64", Emulated: true}}
	w.waits = []string{"launching", "starting"}
	os.WriteFile("/tmp/driver/env", []byte(fmt.Sprintf("export DEPOT_API_URL=%s DEPOT_TOKEN=%s\n", w.env["DEPOT_API_URL"], w.env["DEPOT_TOKEN"])), 0o600)
	for {
		if _, err := os.Stat("/tmp/driver/stop"); err == nil {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	fmt.Println("held", w.held(), "acquired", len(w.acquired))
}
