// Pods: which there are.
//
// The store stands for the API server and the container runtime, which outlive the kubelet: it is kept in a file, so
// that pods are there again after a crash of this program.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"sync"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"
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

// create is the new pod, or the pod that there is already when it is the same one.
func (s *podStore) create(name string, containers []container) (*pod, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.pods {
		if p.Name == name {
			if reflect.DeepEqual(p.Containers, containers) {
				return p, nil
			}
			return nil, &commandError{Kind: "request", Message: fmt.Sprintf("there is another pod %q already", name)}
		}
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
