// The kubelet's life: what one life is made of, and how it starts, stops and starts again.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	_ "unsafe" // for go:linkname

	cadvisorapi "github.com/google/cadvisor/info/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	watcherapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
	"k8s.io/kubernetes/pkg/kubelet/cm/containermap"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
	"k8s.io/kubernetes/pkg/kubelet/cm/topologymanager"
	"k8s.io/kubernetes/pkg/kubelet/config"
	"k8s.io/kubernetes/pkg/kubelet/pluginmanager"
)

// newManagerImpl is unexported; the exported constructor fixes the socket's path to /var/lib/kubelet.
//
//go:linkname newManagerImpl k8s.io/kubernetes/pkg/kubelet/cm/devicemanager.newManagerImpl
func newManagerImpl(logger klog.Logger, socketPath string, topology []cadvisorapi.Node,
	store topologymanager.Store) (*devicemanager.ManagerImpl, error)

// kubelet is what stays over restarts: the options, and the pods (the API server's and the runtime's memory).
type kubelet struct {
	directory string
	numaNodes int
	policy    string
	pods      *podStore

	lifecycle sync.Mutex // one start or stop at a time
	current   atomic.Pointer[life]
}

// life is one run of the kubelet, from its start to its stop. Nothing in it is used again after.
type life struct {
	devices      *devicemanager.ManagerImpl
	plugins      pluginmanager.PluginManager
	topology     topologymanager.Manager
	admission    sync.Mutex  // the kubelet admits one pod at a time
	sourcesReady atomic.Bool // false while the pods known from before are admitted again
	claimsMutex  sync.Mutex
	claimed      []claim
	over         chan struct{}
	tasks        sync.WaitGroup
}

var errStopped = &commandError{Kind: "stopped", Message: "the kubelet is stopped: start it first"}

// running is the present life; errStopped when there is none.
func (k *kubelet) running() (*life, error) {
	if l := k.current.Load(); l != nil {
		return l, nil
	}
	return nil, errStopped
}

func (k *kubelet) pluginDirectory() string { return filepath.Join(k.directory, "device-plugins") }

// start begins a new life on the directory as it is: the checkpoint is read, and then, as in production, the pods known
// from before are admitted again, their containers running (unless it is a reboot). A refused pod is gone.
func (k *kubelet) start(arguments startArguments) (*startResult, error) {
	k.lifecycle.Lock()
	defer k.lifecycle.Unlock()
	if k.current.Load() != nil {
		return nil, &commandError{Kind: "running", Message: "the kubelet is running already"}
	}
	for _, directory := range []string{k.pluginDirectory(), k.registryDirectory(), k.podResourcesDirectory()} {
		if err := os.MkdirAll(directory, 0o750); err != nil {
			return nil, err
		}
	}
	if arguments.Reboot {
		k.pods.stopContainers()
	}
	logger := klog.Background()
	l := &life{over: make(chan struct{})}
	nodes := make([]cadvisorapi.Node, k.numaNodes)
	for i := range nodes {
		nodes[i].Id = i
	}
	var err error
	if l.topology, err = topologymanager.NewManager(nodes, k.policy, "container", nil); err != nil {
		return nil, err
	}
	socket := filepath.Join(k.pluginDirectory(), "kubelet.sock")
	if l.devices, err = newManagerImpl(logger, socket, nodes, l.topology); err != nil {
		return nil, err
	}
	l.topology.AddHintProvider(logger, l.devices)

	ready := config.NewSourcesReady(func(sets.Set[string]) bool { return l.sourcesReady.Load() })
	containers, running := containermap.NewContainerMap(), sets.New[string]()
	k.pods.visitContainers(func(pod *pod, container string) {
		id := pod.UID + "/" + container
		containers.Add(pod.UID, container, id)
		if pod.Running {
			running.Insert(id)
		}
	})
	if err = l.devices.Start(logger, k.pods.active, ready, containers, running); err != nil {
		return nil, err
	}
	if err = servePodResources(k, l); err != nil {
		return nil, errors.Join(err, l.devices.Stop(logger))
	}
	l.tasks.Go(l.logUpdates)
	l.plugins = pluginmanager.NewPluginManager(k.registryDirectory(), &record.FakeRecorder{})
	l.plugins.AddHandler(watcherapi.DevicePlugin, l.devices.GetWatcherHandler())
	for _, kind := range []string{watcherapi.CSIPlugin, watcherapi.DRAPlugin} {
		l.plugins.AddHandler(kind, &claims{kind: kind, of: l})
	}
	l.tasks.Go(func() { l.plugins.Run(context.Background(), ready, l.over) })

	result := &startResult{Refused: []refusedPod{}}
	for _, pod := range k.pods.list() {
		if refusal := l.admit(pod.spec()); refusal != nil {
			k.pods.remove(pod.Name)
			result.Refused = append(result.Refused, refusedPod{pod.Name, refusal.Reason, refusal.Message})
		}
	}
	l.sourcesReady.Store(true)
	k.current.Store(l)
	return result, nil
}

// stop ends the present life in order: streams are closed and the sockets removed. The kubelet itself is not so polite:
// it just exits, as after a SIGKILL of this program, and leaves its sockets behind. No error when there is no life.
func (k *kubelet) stop() error {
	k.lifecycle.Lock()
	defer k.lifecycle.Unlock()
	l := k.current.Swap(nil)
	if l == nil {
		return nil
	}
	close(l.over)
	l.tasks.Wait()
	if err := l.devices.Stop(klog.Background()); err != nil {
		return fmt.Errorf("the device manager did not stop: %w", err)
	}
	return nil
}

// logUpdates takes the device manager's notes of a changed health: its channel holds 100, then they are lost.
func (l *life) logUpdates() {
	for {
		select {
		case update := <-l.devices.Updates():
			klog.InfoS("Harness: the health of pods' devices changed", "podUIDs", update.PodUIDs)
		case <-l.over:
			return
		}
	}
}

func (k *kubelet) registryDirectory() string { return filepath.Join(k.directory, "plugins_registry") }

func (k *kubelet) podResourcesDirectory() string { return filepath.Join(k.directory, "pod-resources") }
