// Admission: how a pod comes to its devices, and what its containers are given.

package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
)

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

// allocate creates a pod, admits it and starts its containers: what each of them is given. A pod that is there already is
// admitted anew. A refused pod is gone; a pod whose container cannot be started stays, as it does in production.
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
	if options == nil { // nothing of it is a device plugin's, as far as the kubelet knows
		options = &devicemanager.DeviceRunContainerOptions{}
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
