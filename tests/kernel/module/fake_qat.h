/* SPDX-License-Identifier: GPL-2.0 */
/*
 * fake_qat: QuickAssist PFs and VFs without hardware, for tests only; never shipped.
 *
 *	bridge.c	the module: virtual PCI host bridges, one for each device, made and removed
 *	config.c	configuration space of the functions behind them, and SR-IOV's answer to it
 *	drivers.c	the PF and VF drivers: up, down, SR-IOV as Intel's qat_common does it
 *	attributes.c	what the PF driver shows in sysfs: qat/ and qat_ras/
 *	debugfs.c	what the PF driver shows in debugfs, and the switches with which tests make faults
 *	iommu.c		a pretend IOMMU, where none is running
 *
 * The PCI core, SR-IOV, driver binding, uevents, IOMMU groups and vfio-pci are the kernel's own. There are no
 * interrupts and no DMA, and with bars=1 an empty BAR.
 */
#ifndef FAKE_QAT_H
#define FAKE_QAT_H

#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/workqueue.h>

#define FQ_MAX		16	/* root buses */
#define FQ_MAX_VFS	64
#define FQ_NAME		64	/* a services text, with its end */

/* One PCI function's configuration space. */
struct fq_function {
	u8 value[PCI_CFG_SPACE_EXP_SIZE];
	u8 writable[PCI_CFG_SPACE_EXP_SIZE];	/* mask */
};

/* One root bus: a PF with its VFs, or one other function. */
struct fq_device {
	struct pci_sysdata sysdata;	/* what bus->sysdata must be on x86 */
	struct pci_bus *root;
	struct fq_function function, *vfs;
	u16 vendor, device;
	u8 bus;
	u32 total_vfs, vf_offset;
	bool present;			/* not pulled out */
	unsigned long resets;		/* function level resets seen, of all functions */

	/* The driver's own, as struct adf_accel_dev. */
	struct pci_dev *pdev;		/* while the PF driver has it */
	struct mutex state_lock;	/* changes of what follows */
	bool up, sriov, auto_reset, pm_idle;
	bool ras_added;
	char services[FQ_NAME];
	u32 ring;
	u64 errors[3];			/* correctable, non-fatal, fatal */
	u32 telemetry, snapshots;
	u32 queries_sent, queries_failed;
	struct dentry *debugfs, *debugfs_up;

	/* The switches (debugfs.c). */
	struct dentry *switches;
	s32 heartbeat;			/* 0 or -1: the firmware does not answer */
	bool busy;			/* in reset, or used inside the kernel */
	u32 error;			/* errno that each store of state, services, VFs answers; 0: none */
	u32 delay_ms;			/* how long each such store takes */
	u32 heartbeat_delay_ms;
};

extern struct fq_device *fq_devices[FQ_MAX];

/* config.c */
extern struct pci_ops fq_ops;
void fq_config_init(struct fq_device *fq);
static inline bool fq_ours(struct pci_dev *pdev)
{
	return pdev->bus->ops == &fq_ops;
}

static inline struct fq_device *fq_of(struct device *dev)
{
	return container_of(to_pci_dev(dev)->bus->sysdata, struct fq_device, sysdata);
}

/* bridge.c */
extern bool fq_bars;
int fq_add(const char *text);
void fq_plug(struct fq_device *fq, bool present);

/* drivers.c */
int fq_drivers_register(void);
void fq_drivers_unregister(void);
bool fq_is_pf(u16 device);
bool fq_has_attributes(u16 device);
bool fq_is_gen6(u16 device);
int fq_fault(struct fq_device *fq);
int fq_up(struct fq_device *fq);
void fq_down(struct fq_device *fq);

/* attributes.c */
int fq_attributes_add(struct fq_device *fq);
int fq_ras_add(struct fq_device *fq);
void fq_ras_remove(struct fq_device *fq);

/* debugfs.c */
void fq_debugfs_init(struct fq_device *fq);
void fq_debugfs_exit(struct fq_device *fq);
void fq_debugfs_up(struct fq_device *fq);
void fq_debugfs_down(struct fq_device *fq);
void fq_switches_root(bool add);
void fq_switches_add(struct fq_device *fq);

/* iommu.c */
int fq_iommu_start(void);
void fq_iommu_stop(void);

#endif
