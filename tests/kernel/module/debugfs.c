// SPDX-License-Identifier: GPL-2.0
/*
 * qat_<driver>_<address>/: dev_cfg always, heartbeat/ and telemetry/ while the device is up, as adf_dbgfs.c has it.
 * fake_qat/<address>/: the switches of the tests. They stay while the device is down, without a driver, or away.
 */
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/seq_file.h>
#include <linux/uaccess.h>
#include "fake_qat.h"

#define TELEMETRY_DEPTH 4	/* as many snapshots as gen4 keeps */

static int dev_cfg_show(struct seq_file *s, void *unused)
{
	struct fq_device *fq = s->private;

	seq_puts(s, "[KERNEL]\nNumberCyInstances = 0\nNumberDcInstances = 0\n[GENERAL]\n");
	if (fq->services[0])
		seq_printf(s, "ServicesEnabled = %s\n", fq->services);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(dev_cfg);

/* One read is one query; the text ends with a NUL, as the real one's does. */
static ssize_t status_read(struct file *file, char __user *buf, size_t count, loff_t *pos)
{
	struct fq_device *fq = file->private_data;
	char text[4];
	int length;

	if (*pos > 0)
		return 0;
	if (fq->heartbeat_delay_ms)
		msleep(fq->heartbeat_delay_ms);
	fq->queries_sent++;
	if (fq->heartbeat)
		fq->queries_failed++;
	length = scnprintf(text, sizeof(text), "%d\n", fq->heartbeat ? -1 : 0);
	return simple_read_from_buffer(buf, count, pos, text, length + 1);
}

static const struct file_operations status_fops = {
	.owner = THIS_MODULE, .open = simple_open, .read = status_read,
};

static int control_get(void *data, u64 *value)
{
	*value = ((struct fq_device *)data)->telemetry;
	return 0;
}

static int control_set(void *data, u64 value)
{
	struct fq_device *fq = data;

	if (value > TELEMETRY_DEPTH)
		return -EINVAL;
	fq->telemetry = value;
	fq->snapshots = 0;
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(control_fops, control_get, control_set, "%llu\n");

/* Counters as gen4 names them; they count what was read, so that a test sees them move. */
static int device_data_show(struct seq_file *s, void *unused)
{
	static const char * const counters[] = {
		"pci_trans_cnt", "max_rd_lat", "rd_lat_acc_avg", "max_gp_to_put_lat", "gp_to_put_lat_acc_avg",
		"bw_in", "bw_out", "at_page_req_lat_avg", "at_trans_lat_avg", "at_max_tlb_used",
		"util_cpr0", "exec_cpr0", "util_xlt0", "exec_xlt0", "util_dcpr0", "exec_dcpr0",
		"util_pke0", "exec_pke0", "util_wat0", "exec_wat0", "util_wcp0", "exec_wcp0",
		"util_cph0", "exec_cph0", "util_ath0", "exec_ath0", "util_ucs0", "exec_ucs0",
	};
	struct fq_device *fq = s->private;
	int i;

	if (!fq->telemetry)
		return -EPERM;
	seq_printf(s, "%-*s%*u\n", 23, "sample_cnt", 20, ++fq->snapshots);
	for (i = 0; i < ARRAY_SIZE(counters); i++)
		seq_printf(s, "%-*s%*u\n", 23, counters[i], 20, fq->snapshots * (i + 1));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(device_data);

void fq_debugfs_init(struct fq_device *fq)
{
	char name[64];

	scnprintf(name, sizeof(name), "qat_%s_%s", fq->pdev->driver->name, pci_name(fq->pdev));
	fq->debugfs = debugfs_create_dir(name, NULL);
	debugfs_create_file("dev_cfg", 0400, fq->debugfs, fq, &dev_cfg_fops);
}

void fq_debugfs_exit(struct fq_device *fq)
{
	debugfs_remove(fq->debugfs);
	fq->debugfs = NULL;
}

void fq_debugfs_up(struct fq_device *fq)
{
	struct dentry *heartbeat = debugfs_create_dir("heartbeat", fq->debugfs);
	struct dentry *telemetry;

	debugfs_create_file("status", 0400, heartbeat, fq, &status_fops);
	debugfs_create_u32("queries_sent", 0400, heartbeat, &fq->queries_sent);
	debugfs_create_u32("queries_failed", 0400, heartbeat, &fq->queries_failed);
	if (!fq_has_attributes(fq->device))
		return;
	telemetry = debugfs_create_dir("telemetry", fq->debugfs);
	debugfs_create_file_unsafe("control", 0600, telemetry, fq, &control_fops);
	debugfs_create_file("device_data", 0400, telemetry, fq, &device_data_fops);
}

void fq_debugfs_down(struct fq_device *fq)
{
	debugfs_lookup_and_remove("telemetry", fq->debugfs);
	debugfs_lookup_and_remove("heartbeat", fq->debugfs);
	fq->telemetry = 0;
}

/* The switches. */

static struct dentry *switches;

static int present_get(void *data, u64 *value)
{
	*value = ((struct fq_device *)data)->present;
	return 0;
}

static int present_set(void *data, u64 value)
{
	fq_plug(data, value);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(present_fops, present_get, present_set, "%llu\n");

static int heartbeat_get(void *data, u64 *value)
{
	*value = (s64)((struct fq_device *)data)->heartbeat;
	return 0;
}

static int heartbeat_set(void *data, u64 value)
{
	((struct fq_device *)data)->heartbeat = value ? -1 : 0;
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE_SIGNED(heartbeat_fops, heartbeat_get, heartbeat_set, "%lld\n");

static ssize_t add_write(struct file *file, const char __user *buf, size_t count, loff_t *pos)
{
	char text[64] = { };
	int ret = simple_write_to_buffer(text, sizeof(text) - 1, pos, buf, count);

	if (ret >= 0)
		ret = fq_add(text) ?: ret;
	return ret;
}

static const struct file_operations add_fops = { .owner = THIS_MODULE, .open = simple_open, .write = add_write };

void fq_switches_root(bool add)
{
	if (add) {
		switches = debugfs_create_dir("fake_qat", NULL);
		debugfs_create_file("add", 0200, switches, NULL, &add_fops);
	} else {
		debugfs_remove(switches);
	}
}

void fq_switches_add(struct fq_device *fq)
{
	char name[32];

	scnprintf(name, sizeof(name), "%04x:%02x:00.0", pci_domain_nr(fq->root), fq->root->number);
	fq->switches = debugfs_create_dir(name, switches);
	debugfs_create_file_unsafe("heartbeat", 0600, fq->switches, fq, &heartbeat_fops);
	debugfs_create_file_unsafe("present", 0600, fq->switches, fq, &present_fops);
	debugfs_create_bool("busy", 0600, fq->switches, &fq->busy);
	debugfs_create_u32("error", 0600, fq->switches, &fq->error);
	debugfs_create_u32("delay_ms", 0600, fq->switches, &fq->delay_ms);
	debugfs_create_u32("heartbeat_delay_ms", 0600, fq->switches, &fq->heartbeat_delay_ms);
	debugfs_create_ulong("resets", 0400, fq->switches, &fq->resets);
	debugfs_create_u64("errors_correctable", 0600, fq->switches, &fq->errors[0]);
	debugfs_create_u64("errors_nonfatal", 0600, fq->switches, &fq->errors[1]);
	debugfs_create_u64("errors_fatal", 0600, fq->switches, &fq->errors[2]);
}
