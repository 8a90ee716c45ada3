// The commands: their table, their arguments and results, and how they travel.
//
// A request is one line of JSON, {"command": NAME, "arguments": {...}}, an answer another:
// {"ok": true, "ms": 1.5, "result": {...}} or {"ok": false, "ms": 1.5, "error": {"kind", "reason", "message"}}.
// Commands on one connection are carried out one after the other; those on several connections at the same time.

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// table is all that can be asked.
var table = map[string]handler{
	"capacity": command((*kubelet).capacity), // capacity and allocatable of the node
	"wait":     command((*kubelet).wait),     // until these are as asked for
	"devices":  command((*kubelet).devices),  // every listed device, and who has it
	"check":    command((*kubelet).check),    // do the kubelet's books agree?
	"health":   command((*kubelet).health),   // of the registration service
	"watcher":  command((*kubelet).watcher),  // has the plugin watcher done all that it is to do?
	"age":      command((*kubelet).age),      // make a stopped endpoint older

	"allocate": command((*kubelet).allocate),         // create a pod, admit it, start its containers
	"prestart": command((*kubelet).restartContainer), // start a container of an admitted pod again
	"status":   command((*kubelet).status),           // the health of a pod's devices
	"free":     command((*kubelet).free),             // delete a pod
	"pods":     command((*kubelet).listPods),         // the pods and their devices

	"stop":  command(func(k *kubelet, _ empty) (*empty, error) { return &empty{}, k.stop() }),
	"start": command((*kubelet).start),
}

type empty struct{}

type capacityResult struct {
	Capacity    map[string]int64 `json:"capacity"`
	Allocatable map[string]int64 `json:"allocatable"`
	Deleted     []string         `json:"deleted"`
}

type waitArguments struct {
	Capacity    map[string]*int64 `json:"capacity"`
	Allocatable map[string]*int64 `json:"allocatable"`
	TimeoutMs   int64             `json:"timeout_ms"`
}

type waitResult struct {
	capacityResult
	WaitedMs float64 `json:"waited_ms"`
}

type holder struct {
	Pod       string `json:"pod"`
	Container string `json:"container"`
}

// device: Health is the plugin's word; Allocatable is false for all when the endpoint is gone.
type device struct {
	ID          string  `json:"id"`
	Health      string  `json:"health"`
	NUMANodes   []int64 `json:"numa_nodes"`
	Allocatable bool    `json:"allocatable"`
	Holder      *holder `json:"holder"`
}

type devicesResult struct {
	Devices map[string][]device `json:"devices"`
}

type resourceBooks struct {
	Capacity    int64    `json:"capacity"`
	Allocatable int64    `json:"allocatable"`
	Healthy     []string `json:"healthy"`
	Unhealthy   []string `json:"unhealthy"`
	Allocated   []string `json:"allocated"`
}

type checkResult struct {
	Violations []string                  `json:"violations"`
	Resources  map[string]*resourceBooks `json:"resources"`
}

// claim is a plugin of another type that the plugin manager has passed to its handler.
type claim struct {
	Type     string `json:"type"`
	Name     string `json:"name"`
	Endpoint string `json:"endpoint"`
}

type watcherResult struct {
	Settled bool    `json:"settled"`
	Claimed []claim `json:"claimed"`
}

type ageArguments struct {
	Resource string `json:"resource"`
	Seconds  int64  `json:"seconds"`
}

type allocateArguments struct {
	Pod        string      `json:"pod"`
	Containers []container `json:"containers"`
}

func (a *allocateArguments) check() error {
	names := map[string]bool{}
	for _, c := range a.Containers {
		if c.Name == "" || names[c.Name] {
			return &commandError{Kind: "request", Message: fmt.Sprintf("container name %q is empty or there twice", c.Name)}
		}
		names[c.Name] = true
	}
	if a.Pod == "" || len(a.Containers) == 0 {
		return &commandError{Kind: "request", Message: "a pod needs a name and at least one container"}
	}
	return nil
}

type mount struct {
	HostPath      string `json:"host_path"`
	ContainerPath string `json:"container_path"`
	ReadOnly      bool   `json:"read_only"`
}

type deviceNode struct {
	HostPath      string `json:"host_path"`
	ContainerPath string `json:"container_path"`
	Permissions   string `json:"permissions"`
}

type containerAllocation struct {
	Name        string              `json:"name"`
	Devices     map[string][]string `json:"devices"`
	Envs        map[string]string   `json:"envs"`
	Mounts      []mount             `json:"mounts"`
	DeviceNodes []deviceNode        `json:"device_nodes"`
	Annotations map[string]string   `json:"annotations"`
	CDIDevices  []string            `json:"cdi_devices"`
}

type allocation struct {
	Pod        string                `json:"pod"`
	Containers []containerAllocation `json:"containers"`
}

type podArguments struct {
	Pod string `json:"pod"`
}

type containerArguments struct {
	Pod       string `json:"pod"`
	Container string `json:"container"`
}

// podDevices: device ids by container and resource.
type podDevices struct {
	Pod        string                         `json:"pod"`
	Running    bool                           `json:"running"`
	Containers map[string]map[string][]string `json:"containers"`
}

type podsResult struct {
	Pods []podDevices `json:"pods"`
}

// statusResult: a device's health by container, resource and id.
type statusResult struct {
	Containers map[string]map[string]map[string]string `json:"containers"`
}

// startArguments: Reboot starts the kubelet as after a reboot of the node, when no container runs yet.
type startArguments struct {
	Reboot bool `json:"reboot"`
}

type refusedPod struct {
	Pod     string `json:"pod"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// startResult: the pods from before that were not admitted again.
type startResult struct {
	Refused []refusedPod `json:"refused"`
}

// commandError is why a command failed. Kind is one of request, not-found, stopped, running, timeout, unhealthy, failed,
// admission (Reason is then the kubelet's) and container (a container of an admitted pod could not be started).
type commandError struct {
	Kind    string `json:"kind"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func (e *commandError) Error() string { return e.Message }

type request struct {
	Command   string          `json:"command"`
	Arguments json.RawMessage `json:"arguments"`
}

type answer struct {
	OK     bool          `json:"ok"`
	Ms     float64       `json:"ms"`
	Result any           `json:"result,omitempty"`
	Error  *commandError `json:"error,omitempty"`
}

type handler func(*kubelet, json.RawMessage) (any, error)

// command makes a row of the table from a typed function.
func command[Arguments, Result any](carryOut func(*kubelet, Arguments) (*Result, error)) handler {
	return func(k *kubelet, raw json.RawMessage) (any, error) {
		var arguments Arguments
		if len(raw) > 0 {
			if err := decode(raw, &arguments); err != nil {
				return nil, err
			}
		}
		result, err := carryOut(k, arguments)
		if err != nil {
			return nil, err // not `result, err`: a nil pointer in an interface is not nil
		}
		return result, nil
	}
}

func decode(data []byte, into any) error {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return &commandError{Kind: "request", Message: err.Error()}
	}
	return nil
}

func serveCommands(k *kubelet, listener net.Listener) {
	for {
		connection, err := listener.Accept()
		if err != nil {
			return // closed: the program ends
		}
		go serveConnection(k, connection)
	}
}

func serveConnection(k *kubelet, connection net.Conn) {
	defer connection.Close()
	lines := bufio.NewScanner(connection)
	lines.Buffer(nil, 1<<20)
	encoder := json.NewEncoder(connection)
	for lines.Scan() {
		if encoder.Encode(carryOut(k, lines.Bytes())) != nil {
			return
		}
	}
}

func carryOut(k *kubelet, line []byte) answer {
	began := time.Now()
	result, err := func() (any, error) {
		var r request
		if err := decode(line, &r); err != nil {
			return nil, err
		}
		carryOut, known := table[r.Command]
		if !known {
			return nil, &commandError{Kind: "request", Message: fmt.Sprintf("there is no command %q", r.Command)}
		}
		return carryOut(k, r.Arguments)
	}()
	a := answer{OK: err == nil, Ms: milliseconds(time.Since(began)), Result: result}
	if err != nil && !errors.As(err, &a.Error) {
		a.Error = &commandError{Kind: "failed", Message: err.Error()}
	}
	return a
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
