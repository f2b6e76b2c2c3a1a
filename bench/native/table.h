/* SPDX-License-Identifier: GPL-2.0 */
/* A table that another process made, for guest/linux/units.c to count in. */
#ifndef COIOMMU_NATIVE_TABLE_H
#define COIOMMU_NATIVE_TABLE_H

#include "dtt.h"

/* @ram: guest RAM from GPA 0 on. @cpus: how many count at once. */
void native_table(void *ram, u64 root, unsigned int levels, unsigned int cpus);

#endif /* COIOMMU_NATIVE_TABLE_H */
