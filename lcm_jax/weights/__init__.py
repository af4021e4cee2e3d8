"""Weights read and written: conversion by tables of rules, and the files that hold tensors and configs."""
