// The kubelet without a cluster: the kubelet's own device manager, topology manager, plugin manager and PodResources
// service, compiled from k8s.io/kubernetes, with neither API server nor containers.
//
// It serves a kubelet's directory as the kubelet does and takes commands on a Unix socket (commands.go has the table); the
// first of them is start.
// What the kubelet logs, and the trace of a crash, go to stderr or to the file of --log. It ends when its standard
// input does, so that it never outlives the test that started it; a SIGKILL is the kubelet's crash.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"k8s.io/klog/v2"
)

func main() {
	var k kubelet
	klog.InitFlags(nil)
	flag.StringVar(&k.directory, "kubelet-dir", "",
		"absolute path of the kubelet's directory: device-plugins, plugins_registry and pod-resources are made in it")
	control := flag.String("control", "", "Unix socket to take commands on")
	flag.IntVar(&k.numaNodes, "numa", 2, "number of NUMA nodes")
	flag.StringVar(&k.policy, "policy", "best-effort",
		"topology manager policy: none, best-effort, restricted or single-numa-node")
	log := flag.String("log", "", "file to append the kubelet's log to (default: stderr)")
	flag.Parse()
	if err := run(&k, *control, *log); err != nil {
		fmt.Fprintln(os.Stderr, "kubelet harness:", err)
		os.Exit(1)
	}
}

// run serves until standard input ends or a SIGTERM or SIGINT comes, and then stops in order.
func run(k *kubelet, control, log string) error {
	if !filepath.IsAbs(k.directory) || control == "" {
		return errors.New("--kubelet-dir (an absolute path) and --control are needed")
	}
	if log != "" {
		if err := redirectStderr(log); err != nil {
			return err
		}
	}
	if err := checkInternals(); err != nil {
		return err
	}
	if err := os.MkdirAll(k.directory, 0o755); err != nil {
		return err
	}
	var err error
	if k.pods, err = loadPods(filepath.Join(k.directory, podsFile)); err != nil {
		return err
	}
	listener, err := net.Listen("unix", control)
	if err != nil {
		return err
	}
	defer listener.Close()
	go serveCommands(k, listener)

	over := make(chan os.Signal, 2)
	signal.Notify(over, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		over <- syscall.SIGHUP
	}()
	<-over
	return k.stop()
}

// redirectStderr makes descriptor 2 the file, so that the Go runtime's trace of a crash lands there too.
func redirectStderr(path string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	return syscall.Dup3(int(file.Fd()), 2, 0)
}
