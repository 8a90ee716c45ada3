// The handlers of the plugin types other than DevicePlugin. The kubelet has the CSI volume plugin and the DRA manager there;
// here they only note what the plugin manager passes to them.

package main

import "time"

type claims struct {
	kind string
	of   *life
}

func (c *claims) ValidatePlugin(string, string, []string) error { return nil }

func (c *claims) RegisterPlugin(name, endpoint string, _ []string, _ *time.Duration) error {
	c.of.claimsMutex.Lock()
	defer c.of.claimsMutex.Unlock()
	c.of.claimed = append(c.of.claimed, claim{c.kind, name, endpoint})
	return nil
}

func (c *claims) DeRegisterPlugin(string, string) {}
