// SPDX-License-Identifier: GPL-2.0
/* The module: virtual PCI host bridges, one for each device that its parameter names. */
#include <linux/module.h>
#include <linux/slab.h>
#include "fake_qat.h"

struct fq_device *fq_devices[FQ_MAX];

static char *devices[FQ_MAX] = { "0:6b:8086:4940:16:-1" };
static int n_devices = 1;
module_param_array(devices, charp, &n_devices, 0444);
MODULE_PARM_DESC(devices, "domain:bus:vendor:device:vfs:node, one root bus each; vfs only for a PF");

bool fq_bars;
module_param_named(bars, fq_bars, bool, 0444);
MODULE_PARM_DESC(bars, "give each VF a BAR, which igb_uio asks for");

/* Pull a device out, or put it in again: it is found by a rescan. Called by its switch. */
void fq_plug(struct fq_device *fq, bool present)
{
	struct pci_dev *pdev;

	pci_lock_rescan_remove();
	if (fq->present && !present) {
		fq->present = false;
		pdev = pci_get_slot(fq->root, 0);
		if (pdev) {
			pci_stop_and_remove_bus_device(pdev);
			pci_dev_put(pdev);
		}
	}
	fq->present = present;
	pci_unlock_rescan_remove();
}

static void fq_free(struct fq_device *fq)
{
	kvfree(fq->vfs);
	kvfree(fq);
}

static struct fq_device *parse(const char *text)
{
	unsigned int domain, bus, vendor, device, vfs;
	struct fq_device *fq;
	int node;

	if (sscanf(text, "%x:%x:%x:%x:%u:%d", &domain, &bus, &vendor, &device, &vfs, &node) != 6 ||
	    bus > 0xff || vfs > FQ_MAX_VFS)
		return ERR_PTR(-EINVAL);
	fq = kvzalloc(sizeof(*fq), GFP_KERNEL);
	if (!fq)
		return ERR_PTR(-ENOMEM);
	fq->vfs = kvcalloc(max(vfs, 1U), sizeof(*fq->vfs), GFP_KERNEL);
	if (!fq->vfs) {
		fq_free(fq);
		return ERR_PTR(-ENOMEM);
	}
	mutex_init(&fq->state_lock);
	fq->sysdata.domain = domain;
	fq->sysdata.node = node;
	fq->bus = bus;
	fq->vendor = vendor;
	fq->device = device;
	fq->total_vfs = vfs;
	fq->vf_offset = fq_has_attributes(device) ? 1 : 8;	/* 00.1 on; before Gen4 01.0 on */
	fq->present = true;
	fq_config_init(fq);
	return fq;
}

/* One more root bus; `text` as in the parameter. Called when the module begins, and by a switch (hot plug). */
int fq_add(const char *text)
{
	struct pci_host_bridge *bridge;
	struct fq_device *fq;
	int index, ret;

	for (index = 0; index < FQ_MAX && fq_devices[index]; index++)
		;
	fq = index < FQ_MAX ? parse(text) : ERR_PTR(-ENOSPC);
	if (IS_ERR(fq))
		return PTR_ERR(fq);
	bridge = pci_alloc_host_bridge(0);
	if (!bridge) {
		fq_free(fq);
		return -ENOMEM;
	}
	bridge->sysdata = &fq->sysdata;
	bridge->busnr = fq->bus;
	bridge->ops = &fq_ops;
	if (fq_bars)
		pci_add_resource(&bridge->windows, &iomem_resource);
	pci_lock_rescan_remove();
	ret = pci_scan_root_bus_bridge(bridge);
	if (!ret) {
		fq->root = bridge->bus;
		fq_devices[index] = fq;
		fq_switches_add(fq);
		if (fq_bars)
			pci_bus_assign_resources(bridge->bus);
		pci_bus_add_devices(bridge->bus);
	}
	pci_unlock_rescan_remove();
	if (ret) {
		pci_free_host_bridge(bridge);
		fq_free(fq);
	}
	return ret;
}

static void remove_all(void)
{
	int i;

	fq_switches_root(false);	/* first: some switches take the lock below */
	pci_lock_rescan_remove();
	for (i = 0; i < FQ_MAX; i++)
		if (fq_devices[i]) {
			pci_stop_root_bus(fq_devices[i]->root);
			pci_remove_root_bus(fq_devices[i]->root);
		}
	pci_unlock_rescan_remove();
	fq_iommu_stop();
	fq_drivers_unregister();
	for (i = 0; i < FQ_MAX; i++)
		if (fq_devices[i])
			fq_free(fq_devices[i]);
}

static int __init fake_qat_init(void)
{
	int i, ret;

	ret = fq_drivers_register();
	if (ret)
		return ret;
	fq_switches_root(true);
	ret = fq_iommu_start();
	for (i = 0; i < n_devices && !ret; i++)
		ret = fq_add(devices[i]);
	if (ret)
		remove_all();
	return ret;
}

static void __exit fake_qat_exit(void)
{
	remove_all();
}

module_init(fake_qat_init);
module_exit(fake_qat_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("QuickAssist PCI devices without hardware, for tests");
