// Resources: what the kubelet reports of the plugins' devices, and whether its books agree with each other.

package main

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/klog/v2"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

func quantities(list v1.ResourceList) map[string]int64 {
	result := map[string]int64{}
	for name, quantity := range list {
		result[string(name)] = quantity.Value()
	}
	return result
}

// capacity is what the kubelet writes to the node's status. As in production, asking drops expired resources.
func (k *kubelet) capacity(empty) (*capacityResult, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	capacity, allocatable, deleted := l.devices.GetCapacity()
	if deleted == nil {
		deleted = []string{}
	}
	slices.Sort(deleted)
	return &capacityResult{quantities(capacity), quantities(allocatable), deleted}, nil
}

// wait returns as soon as capacity and allocatable are as asked for; nil stands for a resource that must be unknown.
// It looks each millisecond. A restart of the kubelet in between is no error: a stopped kubelet is only not there yet.
func (k *kubelet) wait(arguments waitArguments) (*waitResult, error) {
	began := time.Now()
	for {
		seen, err := k.capacity(empty{})
		if err == nil && arguments.met(seen) {
			return &waitResult{*seen, milliseconds(time.Since(began))}, nil
		}
		if milliseconds(time.Since(began)) > float64(arguments.TimeoutMs) {
			if err != nil {
				return nil, err
			}
			return nil, &commandError{Kind: "timeout", Message: fmt.Sprintf(
				"after %d ms capacity is %v and allocatable is %v", arguments.TimeoutMs, seen.Capacity, seen.Allocatable)}
		}
		time.Sleep(time.Millisecond)
	}
}

func (w *waitArguments) met(seen *capacityResult) bool {
	agrees := func(wanted map[string]*int64, found map[string]int64) bool {
		for name, n := range wanted {
			if value, known := found[name]; known != (n != nil) || known && value != *n {
				return false
			}
		}
		return true
	}
	return agrees(w.Capacity, seen.Capacity) && agrees(w.Allocatable, seen.Allocatable)
}

// devices is every device that the plugins have listed, as the kubelet has it in its books.
func (k *kubelet) devices(empty) (*devicesResult, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	holders := map[string]map[string]*holder{}
	for _, p := range k.pods.list() {
		for _, c := range p.Containers {
			for name, ids := range deviceIDs(l.devices.GetDevices(p.UID, c.Name)) {
				if holders[name] == nil {
					holders[name] = map[string]*holder{}
				}
				for _, id := range ids {
					holders[name][id] = &holder{p.Name, c.Name}
				}
			}
		}
	}
	result := &devicesResult{Devices: map[string][]device{}}
	booksOf(l.devices).read(func(b books) {
		for name, listed := range *b.all {
			entries := []device{}
			for _, id := range slices.Sorted(maps.Keys(listed)) {
				entries = append(entries, device{ID: id, Health: listed[id].Health, NUMANodes: numaNodes(listed[id]),
					Allocatable: (*b.healthy)[name].Has(id), Holder: holders[name][id]})
			}
			result.Devices[name] = entries
		}
	})
	return result, nil
}

func numaNodes(d *pluginapi.Device) []int64 {
	nodes := []int64{}
	for _, node := range d.GetTopology().GetNodes() {
		nodes = append(nodes, node.GetID())
	}
	return nodes
}

// check compares the kubelet's books: no device is given to two containers; what is allocatable is what is healthy, and
// nothing else; what is booked as allocated is what pods have. It waits for an admission under way.
func (k *kubelet) check(empty) (*checkResult, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	l.admission.Lock()
	defer l.admission.Unlock()
	l.devices.UpdateAllocatedDevices()
	result := &checkResult{Violations: []string{}, Resources: map[string]*resourceBooks{}}
	violated := func(format string, arguments ...any) {
		result.Violations = append(result.Violations, fmt.Sprintf(format, arguments...))
	}
	of := func(name string) *resourceBooks {
		if result.Resources[name] == nil {
			result.Resources[name] = &resourceBooks{Healthy: []string{}, Unhealthy: []string{}, Allocated: []string{}}
		}
		return result.Resources[name]
	}

	given := map[string]map[string]holder{}
	for _, p := range k.pods.list() {
		for _, c := range p.Containers {
			for name, ids := range deviceIDs(l.devices.GetDevices(p.UID, c.Name)) {
				if given[name] == nil {
					given[name] = map[string]holder{}
				}
				for _, id := range ids {
					if other, taken := given[name][id]; taken {
						violated("%s %s is given to %s/%s and to %s/%s", name, id, other.Pod, other.Container, p.Name, c.Name)
					}
					given[name][id] = holder{p.Name, c.Name}
				}
			}
		}
	}

	var capacity, allocatable v1.ResourceList
	var allocatableDevices map[string][]string
	// A plugin may list other devices at any moment: what is compared is of one moment when the books were the same
	// before and after.
	for before, after := listed(l), (map[string]*resourceBooks)(nil); ; before = after {
		capacity, allocatable, _ = l.devices.GetCapacity()
		allocatableDevices = deviceIDs(l.devices.GetAllocatableDevices())
		if after = listed(l); reflect.DeepEqual(before, after) {
			result.Resources = after
			break
		}
	}
	for name, n := range quantities(capacity) {
		of(name).Capacity = n
	}
	for name, n := range quantities(allocatable) {
		of(name).Allocatable = n
	}

	for _, name := range slices.Sorted(maps.Keys(result.Resources)) {
		r := result.Resources[name]
		if r.Allocatable != int64(len(r.Healthy)) {
			violated("%s: allocatable is %d, but %d devices are healthy", name, r.Allocatable, len(r.Healthy))
		}
		if r.Capacity != int64(len(r.Healthy)+len(r.Unhealthy)) {
			violated("%s: capacity is %d, but %d devices are known", name, r.Capacity, len(r.Healthy)+len(r.Unhealthy))
		}
		if !slices.Equal(allocatableDevices[name], r.Healthy) && len(allocatableDevices[name])+len(r.Healthy) > 0 {
			violated("%s: allocatable devices are %v, healthy ones %v", name, allocatableDevices[name], r.Healthy)
		}
		for _, id := range r.Allocated {
			if _, held := given[name][id]; !held {
				violated("%s %s is booked as allocated, but no container has it: it has leaked", name, id)
			}
		}
		for _, id := range slices.Sorted(maps.Keys(given[name])) {
			if _, booked := slices.BinarySearch(r.Allocated, id); !booked {
				violated("%s %s is given to %s, but not booked as allocated", name, id, given[name][id].Pod)
			}
		}
	}
	return result, nil
}

// listed is what the books have of each resource.
func listed(l *life) map[string]*resourceBooks {
	result := map[string]*resourceBooks{}
	of := func(name string) *resourceBooks {
		if result[name] == nil {
			result[name] = &resourceBooks{Healthy: []string{}, Unhealthy: []string{}, Allocated: []string{}}
		}
		return result[name]
	}
	booksOf(l.devices).read(func(b books) {
		for name := range *b.healthy {
			of(name).Healthy = sorted((*b.healthy)[name])
			of(name).Unhealthy = sorted((*b.unhealthy)[name])
		}
		for name, ids := range *b.allocated {
			if ids.Len() > 0 {
				of(name).Allocated = sorted(ids)
			}
		}
	})
	return result
}

func sorted(ids sets.Set[string]) []string {
	result := append([]string{}, ids.UnsortedList()...)
	slices.Sort(result)
	return result
}

// health is the verdict of the device manager's part of the kubelet's /healthz.
func (k *kubelet) health(empty) (*empty, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	if err := l.devices.GetHealthChecker().Check(nil); err != nil {
		return nil, &commandError{Kind: "unhealthy", Message: err.Error()}
	}
	return &empty{}, nil
}

// watcher tells whether the plugin watcher's next look changes nothing: each socket that it has found is registered as it
// was last found, and no other.
func (k *kubelet) watcher(empty) (*watcherResult, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	wanted, registered := worldsOf(l.plugins)
	found := wanted.GetPluginsToRegister()
	settled := len(found) == len(registered.GetRegisteredPlugins())
	for _, plugin := range found {
		settled = settled && registered.PluginExistsWithCorrectUUID(plugin)
	}
	l.claimsMutex.Lock()
	defer l.claimsMutex.Unlock()
	return &watcherResult{settled, append([]claim{}, l.claimed...)}, nil
}

// age makes a stopped endpoint older: the kubelet forgets its resource after five minutes.
func (k *kubelet) age(arguments ageArguments) (*empty, error) {
	l, err := k.running()
	if err != nil {
		return nil, err
	}
	klog.InfoS("Harness: endpoint made older", "resource", arguments.Resource, "seconds", arguments.Seconds)
	return &empty{}, booksOf(l.devices).age(arguments.Resource, time.Duration(arguments.Seconds)*time.Second)
}
