// The PodResources service: the kubelet's own server on pod-resources/kubelet.sock, with the pods and devices from here.
//
// CPUs, memory and dynamic resources are empty: there are no managers of them.

package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"
	api "k8s.io/kubelet/pkg/apis/podresources/v1"
	apisgrpc "k8s.io/kubernetes/pkg/kubelet/apis/grpc"
	"k8s.io/kubernetes/pkg/kubelet/apis/podresources"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
)

// servePodResources serves until the life is over, with the kubelet's rate limit (pkg/kubelet/server, ListenAndServePodResources).
func servePodResources(k *kubelet, l *life) error {
	path := filepath.Join(k.podResourcesDirectory(), podresources.Socket+".sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // a killed kubelet left its socket behind
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	ctx := context.Background()
	server := grpc.NewServer(
		apisgrpc.WithRateLimiter(ctx, "podresources", podresources.DefaultQPS, podresources.DefaultBurstTokens))
	api.RegisterPodResourcesListerServer(server, podresources.NewV1PodResourcesServer(ctx, podresources.PodResourcesProviders{
		Pods: podsProvider{k.pods}, Devices: devicesProvider{l.devices}, Cpus: nothing{}, Memory: nothing{}, DynamicResources: nothing{},
	}))
	l.tasks.Go(func() { <-l.over; server.Stop() })
	l.tasks.Go(func() {
		if err := server.Serve(listener); err != nil {
			klog.ErrorS(err, "Harness: the PodResources service ended")
		}
	})
	return nil
}

type podsProvider struct{ pods *podStore }

func (p podsProvider) GetActivePods() []*v1.Pod { return p.pods.active() }

func (p podsProvider) GetPods() []*v1.Pod { return p.pods.active() }

func (p podsProvider) GetPodByName(ns, name string) (*v1.Pod, bool) {
	found, err := p.pods.get(name)
	if err != nil || ns != namespace {
		return nil, false
	}
	return found.spec(), true
}

type devicesProvider struct{ devices *devicemanager.ManagerImpl }

func (d devicesProvider) UpdateAllocatedDevices() { d.devices.UpdateAllocatedDevices() }

func (d devicesProvider) GetDevices(podUID, container string) []*api.ContainerDevices {
	return containerDevices(d.devices.GetDevices(podUID, container))
}

func (d devicesProvider) GetAllocatableDevices() []*api.ContainerDevices {
	return containerDevices(d.devices.GetAllocatableDevices())
}

// containerDevices is the kubelet's containerDevicesFromResourceDeviceInstances (pkg/kubelet/cm/container_manager.go): one
// entry for each device and NUMA node.
func containerDevices(instances devicemanager.ResourceDeviceInstances) []*api.ContainerDevices {
	var result []*api.ContainerDevices
	for name, devices := range instances {
		for id, device := range devices {
			if device.GetTopology() == nil {
				result = append(result, &api.ContainerDevices{ResourceName: name, DeviceIds: []string{id}})
				continue
			}
			for _, node := range device.GetTopology().GetNodes() {
				result = append(result, &api.ContainerDevices{ResourceName: name, DeviceIds: []string{id},
					Topology: &api.TopologyInfo{Nodes: []*api.NUMANode{{ID: node.GetID()}}}})
			}
		}
	}
	return result
}

type nothing struct{}

func (nothing) GetCPUs(string, string) []int64 { return nil }

func (nothing) GetAllocatableCPUs() []int64 { return nil }

func (nothing) GetMemory(string, string) []*api.ContainerMemory { return nil }

func (nothing) GetAllocatableMemory() []*api.ContainerMemory { return nil }

func (nothing) GetDynamicResources(*v1.Pod, *v1.Container) []*api.DynamicResource { return nil }
