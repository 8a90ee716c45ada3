// SPDX-License-Identifier: GPL-2.0
/* Configuration space: a byte array with a mask of writable bits for each function, and FLR. */
#include <asm/unaligned.h>
#include "fake_qat.h"

#define PCIE	0x40	/* where the PCI Express capability is */
#define SRIOV	0x100	/* where the SR-IOV extended capability is */

static void put8(struct fq_function *f, int at, u8 value)
{
	f->value[at] = value;
}

static void put16(struct fq_function *f, int at, u16 value)
{
	put_unaligned_le16(value, f->value + at);
}

static void put32(struct fq_function *f, int at, u32 value)
{
	put_unaligned_le32(value, f->value + at);
}

static void writable16(struct fq_function *f, int at, u16 mask)
{
	put_unaligned_le16(mask, f->writable + at);
}

static void function_init(struct fq_function *f, u16 vendor, u16 device, bool vf)
{
	put16(f, PCI_VENDOR_ID, vendor);
	put16(f, PCI_DEVICE_ID, device);
	put16(f, PCI_STATUS, PCI_STATUS_CAP_LIST);
	writable16(f, PCI_COMMAND, vf ? PCI_COMMAND_MASTER :
		   PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE);
	put8(f, PCI_REVISION_ID, 0x40);
	put16(f, PCI_CLASS_DEVICE, 0x0b40);	/* a co-processor */
	put16(f, PCI_SUBSYSTEM_VENDOR_ID, PCI_VENDOR_ID_INTEL);
	put8(f, PCI_CAPABILITY_LIST, PCIE);
	writable16(f, PCI_INTERRUPT_LINE, 0x00ff);
	put8(f, PCIE, PCI_CAP_ID_EXP);
	put16(f, PCIE + PCI_EXP_FLAGS, 2 | PCI_EXP_TYPE_RC_END << 4);
	put32(f, PCIE + PCI_EXP_DEVCAP, PCI_EXP_DEVCAP_RBER | PCI_EXP_DEVCAP_FLR);
	writable16(f, PCIE + PCI_EXP_DEVCTL, 0x7fff);	/* FLR, bit 15, reads as zero */
}

static void sriov_init(struct fq_device *fq)
{
	struct fq_function *f = &fq->function;

	put32(f, SRIOV, PCI_EXT_CAP_ID_SRIOV | 1 << 16);
	writable16(f, SRIOV + PCI_SRIOV_CTRL,
		   PCI_SRIOV_CTRL_VFE | PCI_SRIOV_CTRL_MSE | PCI_SRIOV_CTRL_ARI);
	put16(f, SRIOV + PCI_SRIOV_INITIAL_VF, fq->total_vfs);
	put16(f, SRIOV + PCI_SRIOV_TOTAL_VF, fq->total_vfs);
	writable16(f, SRIOV + PCI_SRIOV_NUM_VF, 0xffff);
	put16(f, SRIOV + PCI_SRIOV_VF_OFFSET, fq->vf_offset);
	put16(f, SRIOV + PCI_SRIOV_VF_STRIDE, 1);
	put16(f, SRIOV + PCI_SRIOV_VF_DID, fq->device + 1);
	put32(f, SRIOV + PCI_SRIOV_SUP_PGSIZE, 0x553);
	put32(f, SRIOV + PCI_SRIOV_SYS_PGSIZE, 1);
	put_unaligned_le32(0xffffffff, f->writable + SRIOV + PCI_SRIOV_SYS_PGSIZE);
	if (fq_bars) {	/* one page for each VF, where nothing answers */
		put32(f, SRIOV + PCI_SRIOV_BAR, PCI_BASE_ADDRESS_MEM_TYPE_64);
		put_unaligned_le32((u32)PAGE_MASK, f->writable + SRIOV + PCI_SRIOV_BAR);
		put_unaligned_le32(0xffffffff, f->writable + SRIOV + PCI_SRIOV_BAR + 4);
	}
}

void fq_config_init(struct fq_device *fq)
{
	u32 i;

	function_init(&fq->function, fq->vendor, fq->device, false);
	if (fq->total_vfs)
		sriov_init(fq);
	/* A VF's own ids read as ones: the PCI core takes them from its PF. */
	for (i = 0; i < fq->total_vfs; i++)
		function_init(fq->vfs + i, 0xffff, 0xffff, true);
}

/* The function at an address, NULL where nothing answers. */
static struct fq_function *find(struct fq_device *fq, struct pci_bus *bus, unsigned int devfn)
{
	u16 control = get_unaligned_le16(fq->function.value + SRIOV + PCI_SRIOV_CTRL);
	u16 number = get_unaligned_le16(fq->function.value + SRIOV + PCI_SRIOV_NUM_VF);

	if (!fq->present || (fq->root && bus != fq->root))
		return NULL;
	if (!devfn)
		return &fq->function;
	if (!fq->total_vfs || !(control & PCI_SRIOV_CTRL_VFE) || devfn < fq->vf_offset ||
	    devfn - fq->vf_offset >= min_t(u32, number, fq->total_vfs))
		return NULL;
	return fq->vfs + devfn - fq->vf_offset;
}

static int fq_read(struct pci_bus *bus, unsigned int devfn, int at, int size, u32 *value)
{
	struct fq_function *f = find(container_of(bus->sysdata, struct fq_device, sysdata), bus, devfn);
	int i;

	*value = ~0;
	if (!f)
		return PCIBIOS_DEVICE_NOT_FOUND;
	for (*value = 0, i = 0; i < size && at + i < PCI_CFG_SPACE_EXP_SIZE; i++)
		*value |= (u32)f->value[at + i] << 8 * i;
	return PCIBIOS_SUCCESSFUL;
}

static int fq_write(struct pci_bus *bus, unsigned int devfn, int at, int size, u32 value)
{
	struct fq_device *fq = container_of(bus->sysdata, struct fq_device, sysdata);
	struct fq_function *f = find(fq, bus, devfn);
	int i;

	if (!f)
		return PCIBIOS_DEVICE_NOT_FOUND;
	if (at == PCIE + PCI_EXP_DEVCTL && value & PCI_EXP_DEVCTL_BCR_FLR) {
		fq->resets++;
		put16(f, PCI_COMMAND, 0);
	}
	for (i = 0; i < size && at + i < PCI_CFG_SPACE_EXP_SIZE; i++, value >>= 8)
		f->value[at + i] = (f->value[at + i] & ~f->writable[at + i]) | (value & f->writable[at + i]);
	return PCIBIOS_SUCCESSFUL;
}

struct pci_ops fq_ops = { .read = fq_read, .write = fq_write };
