// SPDX-License-Identifier: GPL-2.0
/*
 * The drivers 4xxx, 420xx, 6xxx, c6xx and those of their VFs.
 *
 * States, locks and the order of steps are those of qat_common's adf_init.c and adf_sriov.c (Linux 6.12): all VFs are
 * enabled whatever the number, going down takes them away, both wait for those that are open.
 */
#include <linux/delay.h>
#include <linux/module.h>
#include "fake_qat.h"

/* A test's switches: an errno, and how long the store takes. */
int fq_fault(struct fq_device *fq)
{
	if (fq->delay_ms)
		msleep(fq->delay_ms);
	if (fq->busy)
		return -EBUSY;
	return -(int)fq->error;
}

static void disable_vfs(struct fq_device *fq)
{
	if (fq->sriov)
		pci_disable_sriov(fq->pdev);	/* waits for each that is open */
	fq->sriov = false;
}

/* As adf_dev_down: not started any more, then the VFs go. */
void fq_down(struct fq_device *fq)
{
	mutex_lock(&fq->state_lock);
	if (fq->up) {
		fq_debugfs_down(fq);
		fq_ras_remove(fq);
		fq->up = false;
	}
	disable_vfs(fq);
	mutex_unlock(&fq->state_lock);
}

/* As adf_dev_up: VFs do not come back by it. */
int fq_up(struct fq_device *fq)
{
	int ret = 0;

	mutex_lock(&fq->state_lock);
	if (!fq->up) {
		fq->up = true;
		fq_debugfs_up(fq);
		ret = fq_ras_add(fq);
	}
	mutex_unlock(&fq->state_lock);
	return ret;
}

static int enable_vfs(struct fq_device *fq)
{
	int ret;

	if (!device_iommu_mapped(&fq->pdev->dev)) {
		pci_warn(fq->pdev, "IOMMU should be enabled for SR-IOV to work correctly\n");
		return -EINVAL;
	}
	fq_down(fq);
	ret = fq_up(fq);
	if (ret)
		return ret;
	ret = pci_enable_sriov(fq->pdev, fq->total_vfs);
	if (ret)
		return ret;
	fq->sriov = true;
	return fq->total_vfs;
}

static int pf_sriov_configure(struct pci_dev *pdev, int number)
{
	struct fq_device *fq = fq_of(&pdev->dev);
	int ret = fq_fault(fq);

	if (ret)
		return ret;
	if (number)
		return enable_vfs(fq);
	fq_down(fq);
	return fq_up(fq);
}

static int pf_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct fq_device *fq;
	int ret, i;

	if (!fq_ours(pdev))
		return -ENODEV;
	fq = fq_of(&pdev->dev);
	ret = pci_enable_device(pdev);
	if (ret)
		return ret;
	pci_set_master(pdev);
	fq->pdev = pdev;
	for (i = 0; i < FQ_MAX && fq_devices[i] != fq; i++)
		;
	/* The real driver's first configuration: every other device is for compression. */
	strscpy(fq->services, i % 2 ? "dc" : "sym;asym", sizeof(fq->services));
	fq->auto_reset = false;
	fq->pm_idle = true;
	fq->ring = U32_MAX;
	fq_debugfs_init(fq);
	ret = fq_attributes_add(fq);	/* not dev_groups: these stay until remove() is done */
	if (!ret)
		ret = fq_up(fq);
	if (ret) {
		fq_debugfs_exit(fq);
		pci_disable_device(pdev);
	}
	return ret;
}

static void pf_remove(struct pci_dev *pdev)
{
	struct fq_device *fq = fq_of(&pdev->dev);

	fq_down(fq);
	fq_debugfs_exit(fq);
	fq->pdev = NULL;
	pci_disable_device(pdev);
}

static int vf_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	int ret;

	if (!fq_ours(pdev))
		return -ENODEV;
	ret = pci_enable_device(pdev);
	if (!ret)
		pci_set_master(pdev);
	return ret;
}

static void vf_remove(struct pci_dev *pdev)
{
	pci_disable_device(pdev);
}

#define QAT(id) { PCI_VDEVICE(INTEL, id) }
static const struct pci_device_id gen4_pf[] = { QAT(0x4940), QAT(0x4942), QAT(0x4944), { } };
static const struct pci_device_id gen4_vf[] = { QAT(0x4941), QAT(0x4943), QAT(0x4945), { } };
static const struct pci_device_id gen4b_pf[] = { QAT(0x4946), { } };
static const struct pci_device_id gen4b_vf[] = { QAT(0x4947), { } };
static const struct pci_device_id gen6_pf[] = { QAT(0x4948), { } };
static const struct pci_device_id gen6_vf[] = { QAT(0x4949), { } };
static const struct pci_device_id gen2_pf[] = { QAT(0x37c8), { } };
static const struct pci_device_id gen2_vf[] = { QAT(0x37c9), { } };

#define PF_DRIVER(text, ids) {								\
	.name = text, .id_table = ids, .probe = pf_probe, .remove = pf_remove,		\
	.sriov_configure = pf_sriov_configure }
#define VF_DRIVER(text, ids) {								\
	.name = text, .id_table = ids, .probe = vf_probe, .remove = vf_remove }

static struct pci_driver drivers[] = {
	PF_DRIVER("4xxx", gen4_pf), VF_DRIVER("4xxxvf", gen4_vf),
	PF_DRIVER("420xx", gen4b_pf), VF_DRIVER("420xxvf", gen4b_vf),
	PF_DRIVER("6xxx", gen6_pf), VF_DRIVER("6xxxvf", gen6_vf),
	PF_DRIVER("c6xx", gen2_pf), VF_DRIVER("c6xxvf", gen2_vf),
};

bool fq_is_gen6(u16 device)
{
	return device == 0x4948;
}

bool fq_has_attributes(u16 device)
{
	return device == 0x4940 || device == 0x4942 || device == 0x4944 || device == 0x4946 ||
	       fq_is_gen6(device);
}

bool fq_is_pf(u16 device)
{
	return fq_has_attributes(device) || device == 0x37c8;
}

int fq_drivers_register(void)
{
	int i, ret = 0;

	for (i = 0; i < ARRAY_SIZE(drivers) && !ret; i++)
		ret = pci_register_driver(drivers + i);
	if (ret)
		for (i -= 2; i >= 0; i--)
			pci_unregister_driver(drivers + i);
	return ret;
}

void fq_drivers_unregister(void)
{
	int i;

	for (i = ARRAY_SIZE(drivers) - 1; i >= 0; i--)
		pci_unregister_driver(drivers + i);
}
