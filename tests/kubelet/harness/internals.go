// What no exported function of the device manager tells: its fields, read by reflection, under its own mutex.
//
// checkInternals says at the program's start when a kubelet's release has renamed one of them.

package main

import (
	"fmt"
	"reflect"
	"sync"
	"time"
	"unsafe"

	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
	"k8s.io/kubernetes/pkg/kubelet/pluginmanager"
	"k8s.io/kubernetes/pkg/kubelet/pluginmanager/cache"
)

// books are the device manager's maps, each by resource name.
type books struct {
	mutex     *sync.Mutex
	all       *devicemanager.ResourceDeviceInstances
	healthy   *map[string]sets.Set[string]
	unhealthy *map[string]sets.Set[string]
	allocated *map[string]sets.Set[string]
	endpoints reflect.Value // map[string]endpointInfo, an unexported type
}

func booksOf(m *devicemanager.ManagerImpl) books {
	s := reflect.ValueOf(m).Elem()
	return books{
		mutex:     field[sync.Mutex](s, "mutex"),
		all:       field[devicemanager.ResourceDeviceInstances](s, "allDevices"),
		healthy:   field[map[string]sets.Set[string]](s, "healthyDevices"),
		unhealthy: field[map[string]sets.Set[string]](s, "unhealthyDevices"),
		allocated: field[map[string]sets.Set[string]](s, "allocatedDevices"),
		endpoints: s.FieldByName("endpoints"),
	}
}

func (b books) read(look func(books)) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	look(b)
}

// worldsOf are the plugin watcher's lists: what it has found, and what is registered.
func worldsOf(m pluginmanager.PluginManager) (cache.DesiredStateOfWorld, cache.ActualStateOfWorld) {
	s := reflect.ValueOf(m).Elem()
	return *field[cache.DesiredStateOfWorld](s, "desiredStateOfWorld"), *field[cache.ActualStateOfWorld](s, "actualStateOfWorld")
}

// age moves the time at which the endpoint of a resource stopped into the past.
func (b books) age(resource string, by time.Duration) error {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	info := b.endpoints.MapIndex(reflect.ValueOf(resource))
	if !info.IsValid() {
		return &commandError{Kind: "not-found", Message: fmt.Sprintf("there is no endpoint of %q", resource)}
	}
	endpoint := info.FieldByName("e").Elem().Elem() // an interface that holds a pointer
	mutex := field[sync.Mutex](endpoint, "mutex")
	mutex.Lock()
	defer mutex.Unlock()
	stopped := field[time.Time](endpoint, "stopTime")
	if stopped.IsZero() {
		return &commandError{Kind: "request", Message: fmt.Sprintf("the endpoint of %q has not stopped", resource)}
	}
	*stopped = stopped.Add(-by)
	return nil
}

// field is the address of an unexported field; it panics when there is none of that name and type.
func field[T any](s reflect.Value, name string) *T {
	f := s.FieldByName(name)
	if !f.IsValid() || f.Type() != reflect.TypeFor[T]() {
		panic(fmt.Sprintf("%s has no field %s of type %s", s.Type(), name, reflect.TypeFor[T]()))
	}
	return (*T)(unsafe.Pointer(f.UnsafeAddr()))
}

// checkInternals is an error when this release of the device manager has other fields than those read here.
func checkInternals() (err error) {
	defer func() {
		if reason := recover(); reason != nil {
			err = fmt.Errorf("this release of the kubelet needs another internals.go: %v", reason)
		}
	}()
	if b := booksOf(&devicemanager.ManagerImpl{}); !b.endpoints.IsValid() {
		panic("the device manager has no field endpoints")
	}
	worldsOf(pluginmanager.NewPluginManager("", nil))
	return nil
}
