// SPDX-License-Identifier: GPL-2.0
/* A pretend IOMMU for the fake devices alone, with fake_iommu=1, where the machine has none. Linux 6.1 only. */
#include <linux/iommu.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/xarray.h>
#include "fake_qat.h"

static bool fake_iommu;
module_param(fake_iommu, bool, 0444);
MODULE_PARM_DESC(fake_iommu, "give each fake device an IOMMU group although there is no IOMMU");

static struct iommu_device iommu;

struct fq_domain {
	struct iommu_domain domain;
	struct xarray pages;	/* by IOVA page: the physical page */
};

static struct fq_domain *to_fq(struct iommu_domain *domain)
{
	return container_of(domain, struct fq_domain, domain);
}

static bool fq_capable(struct device *dev, enum iommu_cap cap)
{
	return cap == IOMMU_CAP_CACHE_COHERENCY || cap == IOMMU_CAP_INTR_REMAP;
}

static struct iommu_domain *fq_domain_alloc(unsigned int type)
{
	struct fq_domain *made;

	if (type != IOMMU_DOMAIN_IDENTITY && type != IOMMU_DOMAIN_UNMANAGED && type != IOMMU_DOMAIN_BLOCKED)
		return NULL;
	made = kzalloc(sizeof(*made), GFP_KERNEL);
	if (!made)
		return NULL;
	xa_init(&made->pages);
	made->domain.geometry.aperture_end = (1ULL << 48) - 1;
	made->domain.geometry.force_aperture = true;
	return &made->domain;
}

static void fq_domain_free(struct iommu_domain *domain)
{
	xa_destroy(&to_fq(domain)->pages);
	kfree(to_fq(domain));
}

static int fq_attach(struct iommu_domain *domain, struct device *dev)
{
	return 0;
}

static int fq_map(struct iommu_domain *domain, unsigned long iova, phys_addr_t physical, size_t size, size_t number,
		  int prot, gfp_t gfp, size_t *mapped)
{
	for (*mapped = 0; number--; *mapped += size)
		if (xa_is_err(xa_store(&to_fq(domain)->pages, (iova + *mapped) >> PAGE_SHIFT,
				       xa_mk_value((physical + *mapped) >> PAGE_SHIFT), gfp)))
			return -ENOMEM;
	return 0;
}

static size_t fq_unmap(struct iommu_domain *domain, unsigned long iova, size_t size, size_t number,
		       struct iommu_iotlb_gather *gather)
{
	size_t done;

	for (done = 0; number-- && xa_erase(&to_fq(domain)->pages, (iova + done) >> PAGE_SHIFT); done += size)
		;
	return done;
}

static phys_addr_t fq_iova_to_phys(struct iommu_domain *domain, dma_addr_t iova)
{
	void *entry = xa_load(&to_fq(domain)->pages, iova >> PAGE_SHIFT);

	return entry ? (phys_addr_t)xa_to_value(entry) << PAGE_SHIFT | (iova & ~PAGE_MASK) : 0;
}

static struct iommu_device *fq_probe_device(struct device *dev)
{
	return dev_is_pci(dev) && fq_ours(to_pci_dev(dev)) ? &iommu : ERR_PTR(-ENODEV);
}

static void fq_release_device(struct device *dev)
{
}

static int fq_def_domain_type(struct device *dev)
{
	return IOMMU_DOMAIN_IDENTITY;
}

static const struct iommu_ops fq_iommu_ops = {	/* no .owner: the devices must not pin this module */
	.capable = fq_capable, .domain_alloc = fq_domain_alloc, .probe_device = fq_probe_device,
	.release_device = fq_release_device, .device_group = pci_device_group,
	.def_domain_type = fq_def_domain_type, .pgsize_bitmap = PAGE_SIZE,
	.default_domain_ops = &(const struct iommu_domain_ops) {
		.attach_dev = fq_attach, .map_pages = fq_map, .unmap_pages = fq_unmap,
		.iova_to_phys = fq_iova_to_phys, .free = fq_domain_free,
	},
};

int fq_iommu_start(void)
{
	int ret;

	if (!fake_iommu)
		return 0;
	if (pci_bus_type.iommu_ops)
		return -EBUSY;
	ret = iommu_device_sysfs_add(&iommu, NULL, NULL, "fake-qat-iommu");
	if (!ret) {
		iommu.ops = &fq_iommu_ops;
		pci_bus_type.iommu_ops = &fq_iommu_ops;
	}
	return ret;
}

void fq_iommu_stop(void)
{
	if (iommu.ops) {
		pci_bus_type.iommu_ops = NULL;
		iommu_device_sysfs_remove(&iommu);
	}
}
