// SPDX-License-Identifier: GPL-2.0
/* What the PF driver shows in sysfs: qat/ from Gen4 on, and qat_ras/ while the device is up. */
#include <linux/string.h>
#include <linux/sysfs.h>
#include "fake_qat.h"

static const char * const states[] = { "down", "up" };
static const char * const services[] = { "asym", "sym", "dc", "decomp", "dcc" };

static ssize_t state_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", states[fq_of(dev)->up]);
}

static ssize_t state_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	struct fq_device *fq = fq_of(dev);
	int ret = fq_fault(fq), state;

	if (ret)
		return ret;
	state = sysfs_match_string(states, buf);
	if (state < 0)
		return state;
	if (!state && fq->up)
		fq_down(fq);
	else if (state)
		ret = fq_up(fq);
	return ret ?: count;
}
static DEVICE_ATTR_RW(state);

/* The services of a list as a mask; 0 when one is unknown, missing or there twice. */
static unsigned long parse_services(const char *buf)
{
	char text[FQ_NAME], *rest = text, *word;
	unsigned long mask = 0;
	int i;

	if (strscpy(text, buf, sizeof(text)) < 0)
		return 0;
	rest = strim(text);
	while ((word = strsep(&rest, ";"))) {
		i = match_string(services, ARRAY_SIZE(services), word);
		if (i < 0 || mask & BIT(i))
			return 0;
		mask |= BIT(i);
	}
	return mask;
}

static bool supported(u16 device, unsigned long mask)
{
	bool gen6 = fq_is_gen6(device);

	if (!mask || (!gen6 && mask & BIT(3)))
		return false;
	return hweight_long(mask) == 1 || (!(mask & BIT(4)) && hweight_long(mask) <= (gen6 ? 3 : 2));
}

static ssize_t cfg_services_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", fq_of(dev)->services);
}

/* As from Linux 6.16 on: shown in the order of the table, however it was written. */
static ssize_t cfg_services_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	struct fq_device *fq = fq_of(dev);
	unsigned long mask = parse_services(buf);
	int ret = fq_fault(fq), i, at = 0;

	if (ret)
		return ret;
	if (!supported(fq->device, mask))
		return -EINVAL;
	if (fq->up) {
		dev_info(dev, "must be down to reconfigure the service\n");
		return -EINVAL;
	}
	for_each_set_bit(i, &mask, ARRAY_SIZE(services))
		at += scnprintf(fq->services + at, FQ_NAME - at, "%s%s", at ? ";" : "", services[i]);
	return count;
}
static DEVICE_ATTR_RW(cfg_services);

static ssize_t auto_reset_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", fq_of(dev)->auto_reset ? "on" : "off");
}

static ssize_t auto_reset_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	return kstrtobool(buf, &fq_of(dev)->auto_reset) ?: count;
}
static DEVICE_ATTR_RW(auto_reset);

static ssize_t pm_idle_enabled_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n", fq_of(dev)->pm_idle);
}

static ssize_t pm_idle_enabled_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	if (fq_of(dev)->up)
		return -EINVAL;
	return kstrtobool(buf, &fq_of(dev)->pm_idle) ?: count;
}
static DEVICE_ATTR_RW(pm_idle_enabled);

#define RING_PAIRS 64

/* The service of the ring pair that was written last, four pairs a VF. */
static ssize_t rp2srv_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct fq_device *fq = fq_of(dev);
	unsigned long mask = parse_services(fq->services);
	int i, number = hweight_long(mask), wanted;

	if (fq->ring == U32_MAX || !number)
		return -EINVAL;
	wanted = fq->ring % number;
	for_each_set_bit(i, &mask, ARRAY_SIZE(services))
		if (!wanted--)
			return sysfs_emit(buf, "%s\n", services[i]);
	return -EINVAL;
}

static ssize_t rp2srv_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	u32 ring;
	int ret = kstrtouint(buf, 10, &ring);

	if (ret)
		return ret;
	if (ring >= RING_PAIRS)
		return -EINVAL;
	fq_of(dev)->ring = ring;
	return count;
}
static DEVICE_ATTR_RW(rp2srv);

static ssize_t num_rps_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", RING_PAIRS);
}
static DEVICE_ATTR_RO(num_rps);

static struct attribute *qat_attributes[] = {
	&dev_attr_state.attr, &dev_attr_cfg_services.attr, &dev_attr_auto_reset.attr,
	&dev_attr_pm_idle_enabled.attr, &dev_attr_rp2srv.attr, &dev_attr_num_rps.attr, NULL
};
static const struct attribute_group qat_group = { .name = "qat", .attrs = qat_attributes };

int fq_attributes_add(struct fq_device *fq)
{
	return fq_has_attributes(fq->device) ? devm_device_add_group(&fq->pdev->dev, &qat_group) : 0;
}

#define ERRORS(kind, index)										\
static ssize_t errors_##kind##_show(struct device *dev, struct device_attribute *attr, char *buf)	\
{													\
	return sysfs_emit(buf, "%llu\n", fq_of(dev)->errors[index]);					\
}													\
static DEVICE_ATTR_RO(errors_##kind)
ERRORS(correctable, 0);
ERRORS(nonfatal, 1);
ERRORS(fatal, 2);

static ssize_t reset_error_counters_store(struct device *dev, struct device_attribute *attr, const char *buf,
					  size_t count)
{
	if (buf[0] != '1' || count != 2)
		return -EINVAL;
	memset(fq_of(dev)->errors, 0, sizeof(fq_of(dev)->errors));
	return count;
}
static DEVICE_ATTR_WO(reset_error_counters);

static struct attribute *ras_attributes[] = {
	&dev_attr_errors_correctable.attr, &dev_attr_errors_nonfatal.attr, &dev_attr_errors_fatal.attr,
	&dev_attr_reset_error_counters.attr, NULL
};
static const struct attribute_group ras_group = { .name = "qat_ras", .attrs = ras_attributes };

int fq_ras_add(struct fq_device *fq)
{
	int ret;

	memset(fq->errors, 0, sizeof(fq->errors));
	if (!fq_has_attributes(fq->device))
		return 0;
	ret = device_add_group(&fq->pdev->dev, &ras_group);
	fq->ras_added = !ret;
	return ret;
}

void fq_ras_remove(struct fq_device *fq)
{
	if (fq->ras_added)
		device_remove_group(&fq->pdev->dev, &ras_group);
	fq->ras_added = false;
}
