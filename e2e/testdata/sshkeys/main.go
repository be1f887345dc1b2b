// Command sshkeys asks the SSH agent which keys it has, as the agent's protocol
// (draft-ietf-sshm-ssh-agent, section 3.5) says, and writes the answer into the
// file that its argument names.
package main

import (
	"encoding/binary"
	"io"
	"net"
	"os"
)

func main() {
	agent, err := net.Dial("unix", os.Getenv("SSH_AUTH_SOCK"))
	check(err)
	_, err = agent.Write([]byte{0, 0, 0, 1, 11}) // a request of one byte: list the keys
	check(err)
	var length uint32
	check(binary.Read(agent, binary.BigEndian, &length))
	answer, err := io.ReadAll(io.LimitReader(agent, int64(length)))
	check(err)
	check(os.WriteFile(os.Args[1], answer, 0o600))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
