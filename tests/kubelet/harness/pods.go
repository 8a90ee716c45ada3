// Pods: which there are, their admission and what their containers are given.
//
// The store stands for the API server and the container runtime, which outlive the kubelet: it is kept in a file, so
// that pods are there again after a crash of this program.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
)

const (
	podsFile  = "harness-pods.json"
	namespace = "default"
)

// container is a container's name and the number that it asks of each resource.
type container struct {
	Name      string           `json:"name"`
	Resources map[string]int64 `json:"resources"`
}

// pod is a pod that has been created and not yet deleted. Running: its containers were started.
type pod struct {
	Name       string      `json:"name"`
	UID        string      `json:"uid"`
	Containers []container `json:"containers"`
	Running    bool        `json:"running"`
}

// spec is the pod as the kubelet knows it.
func (p *pod) spec() *v1.Pod {
	result := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: p.Name, Namespace: namespace, UID: types.UID(p.UID)}}
	for _, c := range p.Containers {
		quantities := v1.ResourceList{}
		for name, n := range c.Resources {
			quantities[v1.ResourceName(name)] = *resource.NewQuantity(n, resource.DecimalSI)
		}
		result.Spec.Containers = append(result.Spec.Containers, v1.Container{
			Name: c.Name, Resources: v1.ResourceRequirements{Limits: quantities, Requests: quantities}})
	}
	return result
}

// podStore holds the pods in the order of their creation.
type podStore struct {
	path string
	mu   sync.Mutex
	pods []*pod // never changed in place: a changed pod is a new one
}

func loadPods(path string) (*podStore, error) {
	store := &podStore{path: path}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return store, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &store.pods); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return store, nil
}

func (s *podStore) list() []*pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.pods)
}

func (s *podStore) get(name string) (*pod, error) {
	for _, p := range s.list() {
		if p.Name == name {
			return p, nil
		}
	}
	return nil, &commandError{Kind: "not-found", Message: fmt.Sprintf("there is no pod %q", name)}
}

// active is the function that the kubelet's parts ask for the pods.
func (s *podStore) active() []*v1.Pod {
	pods := []*v1.Pod{}
	for _, p := range s.list() {
		pods = append(pods, p.spec())
	}
	return pods
}

func (s *podStore) visitContainers(visit func(*pod, string)) {
	for _, p := range s.list() {
		for _, c := range p.Containers {
			visit(p, c.Name)
		}
	}
}

func (s *podStore) create(name string, containers []container) (*pod, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.ContainsFunc(s.pods, func(p *pod) bool { return p.Name == name }) {
		return nil, &commandError{Kind: "request", Message: fmt.Sprintf("there is a pod %q already", name)}
	}
	created := &pod{Name: name, UID: string(uuid.NewUUID()), Containers: containers}
	s.pods = append(s.pods, created)
	s.save()
	return created, nil
}

func (s *podStore) remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pods = slices.DeleteFunc(s.pods, func(p *pod) bool { return p.Name == name })
	s.save()
}

func (s *podStore) setRunning(wanted func(*pod) bool, running bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, p := range s.pods {
		if wanted(p) {
			changed := *p
			changed.Running = running
			s.pods[i] = &changed
		}
	}
	s.save()
}

func (s *podStore) stopContainers() { s.setRunning(func(*pod) bool { return true }, false) }

// save panics on failure: a test whose pods are lost proves nothing.
func (s *podStore) save() {
	data, err := json.Marshal(s.pods)
	if err == nil {
		err = os.WriteFile(s.path+".new", data, 0o600)
	}
	if err == nil {
		err = os.Rename(s.path+".new", s.path)
	}
	if err != nil {
		panic(fmt.Sprintf("the pods cannot be kept: %v", err))
	}
}

// admit does what the kubelet does to admit a pod: ask for topology hints, then allocate, container by container.
func (l *life) admit(spec *v1.Pod) *commandError {
	l.admission.Lock()
	defer l.admission.Unlock()
	result := l.topology.Admit(&lifecycle.PodAdmitAttributes{Pod: spec})
	if result.Admit {
		return nil
	}
	return &commandError{Kind: "admission", Reason: result.Reason, Message: result.Message}
}

// allocate creates a pod, admits it and starts its containers: what each of them is given. A refused pod is gone; a pod
// whose container cannot be started stays, as it does in production.
func (k *kubelet) allocate(arguments allocateArguments) (*allocation, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	if err := arguments.check(); err != nil {
		return nil, err
	}
	created, err := k.pods.create(arguments.Pod, arguments.Containers)
	if err != nil {
		return nil, err
	}
	spec := created.spec()
	if refusal := l.admit(spec); refusal != nil {
		k.pods.remove(created.Name)
		return nil, refusal
	}
	result := &allocation{Pod: created.Name}
	for i := range spec.Spec.Containers {
		given, err := l.startContainer(spec, &spec.Spec.Containers[i])
		if err != nil {
			return nil, err
		}
		result.Containers = append(result.Containers, *given)
	}
	k.pods.setRunning(func(p *pod) bool { return p.UID == created.UID }, true)
	return result, nil
}

// restartContainer is what the kubelet does before a container of an admitted pod runs again: no admission.
func (k *kubelet) restartContainer(arguments containerArguments) (*containerAllocation, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	p, err := k.pods.get(arguments.Pod)
	if err != nil {
		return nil, err
	}
	spec := p.spec()
	for i := range spec.Spec.Containers {
		if spec.Spec.Containers[i].Name == arguments.Container {
			return l.startContainer(spec, &spec.Spec.Containers[i])
		}
	}
	return nil, &commandError{Kind: "not-found",
		Message: fmt.Sprintf("pod %q has no container %q", arguments.Pod, arguments.Container)}
}

// startContainer calls PreStartContainer where the plugin asks for it, and collects what the plugin's answers add.
func (l *life) startContainer(spec *v1.Pod, c *v1.Container) (*containerAllocation, error) {
	options, err := l.devices.GetDeviceRunContainerOptions(context.Background(), spec, c)
	if err != nil {
		return nil, &commandError{Kind: "container", Message: fmt.Sprintf("container %q cannot be started: %v", c.Name, err)}
	}
	result := &containerAllocation{Name: c.Name, Devices: deviceIDs(l.devices.GetDevices(string(spec.UID), c.Name)),
		Envs: map[string]string{}, Annotations: map[string]string{},
		Mounts: []mount{}, DeviceNodes: []deviceNode{}, CDIDevices: []string{}}
	for _, e := range options.Envs {
		result.Envs[e.Name] = e.Value
	}
	for _, a := range options.Annotations {
		result.Annotations[a.Name] = a.Value
	}
	for _, m := range options.Mounts {
		result.Mounts = append(result.Mounts, mount{m.HostPath, m.ContainerPath, m.ReadOnly})
	}
	for _, d := range options.Devices {
		result.DeviceNodes = append(result.DeviceNodes, deviceNode{d.PathOnHost, d.PathInContainer, d.Permissions})
	}
	for _, d := range options.CDIDevices {
		result.CDIDevices = append(result.CDIDevices, d.Name)
	}
	slices.SortFunc(result.Mounts, func(a, b mount) int { return strings.Compare(a.ContainerPath, b.ContainerPath) })
	slices.SortFunc(result.DeviceNodes, func(a, b deviceNode) int { return strings.Compare(a.ContainerPath, b.ContainerPath) })
	return result, nil
}

// free deletes a pod; its devices are free at once (the kubelet itself does this no later than at the next admission).
func (k *kubelet) free(arguments podArguments) (*empty, error) {
	if _, err := k.pods.get(arguments.Pod); err != nil {
		return nil, err
	}
	k.pods.remove(arguments.Pod)
	if l := k.current.Load(); l != nil {
		l.devices.UpdateAllocatedDevices()
	}
	return &empty{}, nil
}

// listPods tells of each pod which devices the kubelet has down for its containers.
func (k *kubelet) listPods(empty) (*podsResult, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	result := &podsResult{Pods: []podDevices{}}
	for _, p := range k.pods.list() {
		entry := podDevices{Pod: p.Name, Running: p.Running, Containers: map[string]map[string][]string{}}
		for _, c := range p.Containers {
			entry.Containers[c.Name] = deviceIDs(l.devices.GetDevices(p.UID, c.Name))
		}
		result.Pods = append(result.Pods, entry)
	}
	return result, nil
}

// status is what the kubelet writes to the API as allocatedResourcesStatus of a pod's containers.
func (k *kubelet) status(arguments podArguments) (*statusResult, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	p, err := k.pods.get(arguments.Pod)
	if err != nil {
		return nil, err
	}
	status := &v1.PodStatus{}
	for _, c := range p.Containers {
		status.ContainerStatuses = append(status.ContainerStatuses, v1.ContainerStatus{Name: c.Name})
	}
	l.devices.UpdateAllocatedResourcesStatus(p.spec(), status)
	result := &statusResult{Containers: map[string]map[string]map[string]string{}}
	for _, c := range status.ContainerStatuses {
		resources := map[string]map[string]string{}
		for _, r := range c.AllocatedResourcesStatus {
			health := map[string]string{}
			for _, device := range r.Resources {
				health[string(device.ResourceID)] = string(device.Health)
			}
			resources[string(r.Name)] = health
		}
		result.Containers[c.Name] = resources
	}
	return result, nil
}

// deviceIDs are the sorted ids of each resource.
func deviceIDs(instances devicemanager.ResourceDeviceInstances) map[string][]string {
	result := map[string][]string{}
	for name, devices := range instances {
		ids := []string{}
		for id := range devices {
			ids = append(ids, id)
		}
		slices.Sort(ids)
		result[name] = ids
	}
	return result
}
