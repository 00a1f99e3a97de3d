from django.contrib import admin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.decorators import display
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from control.admin import ListAdmin, list_link
from users.models import User


@admin.register(User)
class UserAdmin(DjangoUserAdmin, ListAdmin):
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = ["username", "id", "email", "is_staff", "is_active", "date_joined"]
    list_filter = ["is_staff", "is_superuser", "is_active", "groups"]
    search_fields = ["id__exact", "username", "email"]
    search_help_text = "Name, id or e-mail address"
    date_hierarchy = "date_joined"
    show_full_result_count = False
    list_per_page = 30
    readonly_fields = ["id", "see_also", "last_login", "date_joined"]
    fieldsets = [
        (None, {"fields": ["id", "username", "password", "email", "see_also"]}),
        (
            "Permissions",
            {"fields": ["is_active", "is_staff", "is_superuser", "groups", "user_permissions"]},
        ),
        ("Times", {"fields": ["last_login", "date_joined"]}),
    ]

    @display(description="see also")
    def see_also(self, user: User) -> SafeString:
        return format_html(
            "{}, {}, {}",
            list_link("reservations.reservation", "Reservations", user__id__exact=user.pk),
            list_link("purchases.purchase", "Purchases", user__id__exact=user.pk),
            list_link("drops.drop", "Drops created", created_by__id__exact=user.pk),
        )
